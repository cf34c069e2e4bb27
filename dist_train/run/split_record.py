"""The split that was drawn, beside the run: `split.json`, and `split.parquet` with the split of each row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from io import BytesIO

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from dist_train.config.rules import split_seed
from dist_train.config.schema import JobConfig
from dist_train.data.splits.split import IN_NONE, SPLITS
from dist_train.errors import os_errors_as_faults
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import pack_json
from dist_train.system.files import write_atomically
from dist_train.tasks.base import KeepsFiles, Task
from dist_train.training.protocols import Source

_RULE = (
    "split_column", "time_column", "group_column", "validation_fraction", "test_fraction", "folds", "fold",
)  # fmt: skip


def write_split(folder: RunFolder, config: JobConfig, task: Task) -> None:
    """Rank 0 writes which row of the data is in which split, and how many rows of each class that makes.

    A store holds the rows of its splits itself, and may be too large to count here: of one, the number of rows of each
    split is written and nothing more. Raises TrainingFault.
    """
    record = {
        "format": 1,
        "rule": {name: value for name, value in asdict(config.data).items() if name in _RULE},
        "seed": split_seed(config),
        "rows": {name: len(rows) for name, rows in task.splits.items()},
        "data_sha256": task.fingerprint,
    }
    codes = None
    if not any(rows.mapped_bytes for rows in task.splits.values()):
        codes = split_codes(task.splits)
        record["rows_of_classes"] = {name: _of_classes(rows, task.class_names) for name, rows in task.splits.items()}
        record["rows_sha256"] = hashlib.sha256(codes.tobytes()).hexdigest()

    def write() -> None:
        if codes is not None:
            write_atomically(folder.path / "split.parquet", _parquet(codes))
        write_atomically(folder.path / "split.json", pack_json(record))

    os_errors_as_faults(write, "split.json")


def write_kept_files(folder: RunFolder, task: Task) -> None:
    """Rank 0 writes what the task keeps of the data beside the split. Raises TrainingFault."""
    if isinstance(task, KeepsFiles):
        for name, content in task.kept_files().items():
            os_errors_as_faults(partial(write_atomically, folder.path / name, content), name)


def split_codes(splits: Mapping[str, Source]) -> npt.NDArray[np.uint8]:
    """Place in SPLITS of each row of the data up to the last that is in a split, (rows,); IN_NONE between them."""
    numbers = {name: rows.row_numbers.cpu().numpy() for name, rows in splits.items()}
    num_rows = max((int(of_split.max()) + 1 for of_split in numbers.values() if len(of_split)), default=0)
    codes = np.full(num_rows, IN_NONE, dtype=np.uint8)
    for name, of_split in numbers.items():
        codes[of_split] = SPLITS.index(name)
    return codes


def _of_classes(rows: Source, class_names: list[str]) -> dict[str, int]:
    counts = torch.bincount(rows.targets, minlength=len(class_names))
    return dict(zip(class_names, counts.tolist(), strict=True))


def _parquet(codes: npt.NDArray[np.uint8]) -> bytes:
    names = [*SPLITS, None]
    split = pl.Series("split", codes).replace_strict(dict(enumerate(names)), return_dtype=pl.Enum(list(SPLITS)))
    stream = BytesIO()
    split.to_frame().write_parquet(stream)
    return stream.getvalue()
