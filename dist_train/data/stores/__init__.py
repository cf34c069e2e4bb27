"""Rows that are read once: spooled, encoded, kept in files, and what is fitted to them."""
