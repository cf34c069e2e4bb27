"""A table of any size as Parquet files: 50 columns of float32, and three classes that depend on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

NUM_FEATURES = 50
_ROWS_AT_ONCE = 1 << 16


def write_table(folder: Path, num_rows: int, rows_of_a_file: int) -> None:
    """Write `num_rows` rows to `folder/part-NNNN.parquet`; a file that is there in full is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, num_rows, rows_of_a_file)):
        file = folder / f"part-{number:04d}.parquet"
        if file.exists():
            continue
        aside = file.with_suffix(".tmp")
        random = np.random.default_rng(number)
        weights = np.random.default_rng(0).normal(size=(NUM_FEATURES, 3)).astype(np.float32)
        names = [f"x{i:02d}" for i in range(NUM_FEATURES)]
        schema = pa.schema([(name, pa.float32()) for name in names] + [("tier", pa.string())])
        stop = min(start + rows_of_a_file, num_rows)
        with pyarrow.parquet.ParquetWriter(aside, schema, compression="none", use_dictionary=["tier"]) as writer:
            for begin in range(start, stop, _ROWS_AT_ONCE):
                count = min(_ROWS_AT_ONCE, stop - begin)
                features = random.standard_normal((count, NUM_FEATURES), dtype=np.float32)
                noise = random.standard_normal((count, 3), dtype=np.float32)
                tiers = np.array(["high", "low", "mid"])[(features @ weights + 4 * noise).argmax(1)]
                columns = [pa.array(np.ascontiguousarray(features[:, i])) for i in range(NUM_FEATURES)]
                writer.write_table(pa.table([*columns, pa.array(tiers)], schema=schema))
        aside.replace(file)
