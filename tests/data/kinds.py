"""What kind of column each one of a table is, for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from dist_train.data.stores.spool import read_in_memory
from dist_train.data.tables.columns import Columns, kinds_of
from dist_train.data.tables.inputs import whole_file
from dist_train.data.tables.table import ColumnKinds


def feature_kinds(frame: pl.DataFrame, not_features: Sequence[str], categorical: Sequence[str]) -> ColumnKinds:
    """The kinds of a table's columns as they are found when it is read; messages call it `t`."""
    features = [name for name in frame.columns if name not in not_features]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "t.parquet"
        frame.with_columns(pl.lit("a").alias("the target")).write_parquet(file)
        unit, columns = whole_file(file, "t"), Columns(features, "the target", None, list(categorical), [])
        facts, _ = read_in_memory(unit, columns)
        return kinds_of([(unit, facts)], columns)
