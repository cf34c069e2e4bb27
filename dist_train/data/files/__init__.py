"""What a file holds, whatever its format: CSV, JSON lines, Parquet, columns of Arrow, files of a hub."""
