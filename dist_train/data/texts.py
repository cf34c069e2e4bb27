"""Files of texts with a class each: which files, which rows, which split. A mistake is one line with file and row."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from dist_train.config.schema import DataConfig, TextConfig
from dist_train.data.files.hub import hub_folder
from dist_train.data.files.readers import SUFFIXES, read_header, read_rows
from dist_train.data.splits.split import SPLITS, codes_of_column, split_by_fraction
from dist_train.data.tables.classes import (
    check_training_rows,
    check_whole,
    class_indices,
    first_rows,
    index_of_classes,
    ordered_names,
    target_text,
)
from dist_train.data.tables.table import as_text, locate, require_names
from dist_train.errors import UserError
from dist_train.system.files import sha256_of

_ROLES = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}


@dataclass(frozen=True)
class Texts:
    """Texts in the order of their files, with class indices, (rows,) int64, and index in SPLITS, (rows,) uint8."""

    texts: list[str]
    targets: Tensor
    splits: Tensor
    class_names: list[str]
    sha256: str

    def rows_of(self, split: str) -> Tensor:
        """Numbers of the rows of a split, int64, ascending."""
        return (self.splits == SPLITS.index(split)).nonzero().squeeze(1)


def read_texts(data: DataConfig, text: TextConfig, seed: int, class_names: Sequence[str] | None = None) -> Texts:
    """All texts of a configuration, and which split each row is in.

    `data.path` is a file, or a folder with a file of training rows. A folder's other files hold the rows that are not
    trained on: with one of them, its rows are test, and `data.validation_fraction` of the training rows validate; with
    a file of validation rows and one of test rows nothing is drawn. `class_names`: those of a model.

    Raises:
        UserError: a file, or the configuration for it, has a mistake.
    """
    files = _files(data.path, text.hub_dataset)
    frames = {role: _read(file, data, text) for role, file in files.items()}
    cells = {role: target_text(frame[data.target], str(files[role])) for role, frame in frames.items()}
    places: dict[str, tuple[str, int]] = {}
    for role, column in cells.items():
        for name, row in first_rows(column).items():
            places.setdefault(name, (str(files[role]), row))
    check_whole(places, data.target)
    if class_names is None:
        class_names = ordered_names(places, data.target, str(files["train"]))
    known = index_of_classes(class_names, places)
    for name, (file, row) in places.items():
        if name not in known:
            raise UserError(f"{file}: column {data.target!r}, data row {row + 1}: {name!r} is not a class of the model")
    targets = {role: class_indices(column, class_names) for role, column in cells.items()}
    splits = _splits(files, frames, targets, data, seed)
    rows = torch.cat([targets[role] for role in files])
    of_training = torch.cat([splits[role] for role in files]) == SPLITS.index("train")
    counts = torch.bincount(rows[of_training], minlength=len(class_names))
    check_training_rows(counts, list(class_names), str(files["train"]))
    return Texts(
        [cell for role in files for cell in frames[role][text.column].to_list()],
        rows,
        torch.cat([splits[role] for role in files]),
        list(class_names),
        _fingerprint(files),
    )


def read_labelled_texts(
    file: Path, data: DataConfig, text: TextConfig, class_names: Sequence[str]
) -> tuple[list[str], Tensor]:
    """Texts of another file, and class indices, (rows,), by the classes of a model.

    Raises:
        UserError: a column is missing, a text is empty, or a class is unknown.
    """
    frame = _read(file, data, text, with_split=False)
    cells = target_text(frame[data.target], str(file))
    for name, row in first_rows(cells).items():
        if name not in class_names:
            raise UserError(
                f"{file}: column {data.target!r}, data row {row + 1}: {name!r} is not a class; "
                f"the model knows {', '.join(class_names)}"
            )
    return frame[text.column].to_list(), class_indices(cells, class_names)


def texts_of(frame: pl.DataFrame, column: str, source: str, first_row: int = 0) -> list[str]:
    """The texts of a table, which begins with row `first_row` of the source.

    Raises:
        UserError: there is no such column, or a text is empty.
    """
    require_names(frame.columns, [column], source, "text.column")
    cells = as_text(frame[column], source) if frame[column].dtype != pl.String else frame[column]
    empty = cells.fill_null("").str.strip_chars() == ""
    if empty.any():
        row = first_row + int(empty.arg_max() or 0)
        raise UserError(
            f"{source}: column {column!r}, data row {row + 1}: the text is empty: write one, or leave the row out"
        )
    return cells.to_list()


def _read(file: Path, data: DataConfig, text: TextConfig, *, with_split: bool = True) -> pl.DataFrame:
    header = read_header(file)
    require_names(header, [text.column], str(file), "text.column")
    require_names(header, [data.target], str(file), "data.target")
    wanted = [text.column, data.target]
    if with_split and data.split_column in header:
        wanted.append(data.split_column)
    frame = pl.concat(read_rows(file, data.missing_values, columns=wanted))
    if not frame.height:
        raise UserError(f"{file}: the table has no rows")
    return frame.with_columns(pl.Series(text.column, texts_of(frame, text.column, str(file))))


def _splits(
    files: Mapping[str, Path],
    frames: Mapping[str, pl.DataFrame],
    targets: Mapping[str, Tensor],
    data: DataConfig,
    seed: int,
) -> dict[str, Tensor]:
    """Index in SPLITS of each row, by file."""
    held_out = [role for role in files if role != "train"]
    codes = {role: torch.full((len(targets[role]),), SPLITS.index(role), dtype=torch.uint8) for role in files}
    if data.split_column is not None:
        if held_out:
            raise UserError(
                f"data.split_column={data.split_column}: {files['train'].parent} has a file for each split already: "
                "set it to null, or name one file in data.path"
            )
        require_names(frames["train"].columns, [data.split_column], str(files["train"]), "data.split_column")
        return {"train": codes_of_column(frames["train"][data.split_column], str(files["train"]))}
    if len(held_out) == 2:
        return codes
    if held_out:
        codes[held_out[0]].fill_(SPLITS.index("test"))
    drawn = split_by_fraction(
        targets["train"],
        validation_fraction=data.validation_fraction,
        test_fraction=0.0 if held_out else data.test_fraction,
        seed=seed,
    )
    for name, rows in drawn.items():
        codes["train"][rows] = SPLITS.index(name)
    return codes


def _files(path: str, hub_dataset: str | None) -> dict[str, Path]:
    """The files by role: `train`, and those of other splits."""
    place = Path(path)
    if not place.exists() and hub_dataset:
        what = f"data.path={path}: no such file (text.hub_dataset)"
        place = hub_folder(hub_dataset, [f"*{end}" for end in SUFFIXES], what, dataset=True)
    if not place.is_dir():
        return {"train": locate(str(place))}
    by_role: dict[str, list[Path]] = {}
    for file in sorted(place.rglob("*")):
        words = re.split(r"[^a-z]+", file.name.lower())
        roles = {_ROLES[word] for word in words if word in _ROLES}
        if file.is_file() and file.name.lower().endswith(SUFFIXES) and len(roles) == 1:
            by_role.setdefault(roles.pop(), []).append(file)
    for role, found in by_role.items():
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"{place}: has {len(found)} files of {role} rows, {names}: leave one, or name a file")
    if "train" not in by_role:
        raise UserError(f"{place}: is a folder without a file of training rows, as train.csv: name a file in data.path")
    return {role: by_role[role][0] for role in SPLITS if role in by_role}


def _fingerprint(files: Mapping[str, Path]) -> str:
    """SHA-256 of the only file, or over role and SHA-256 of each."""
    digests = {role: sha256_of(file) for role, file in files.items()}
    if len(digests) == 1:
        return digests["train"]
    return hashlib.sha256("".join(f"{role} {digest}\n" for role, digest in digests.items()).encode()).hexdigest()


def texts_sha256(texts: Iterable[str]) -> str:
    """SHA-256 over all texts and their lengths."""
    digest = hashlib.sha256()
    for cell in texts:
        data = cell.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
