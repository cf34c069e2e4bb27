"""A prepared table on disk: encoded rows by split in plain files that are mapped to memory, and a manifest.

`docs/large-tables.md` describes the format. Nothing in a store is code: numbers in little-endian rows, and JSON.
Stores of format 1 are read as well: they hold dense features, in which categories may be one-hot.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config.schema import DataConfig
from dist_train.data.encoding.encoder import Inputs, smallest_int
from dist_train.data.encoding.spec import FeatureSpec, spec_of_encoder
from dist_train.determinism.position import split_evenly
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError

MANIFEST = "manifest.json"
# A store without weights is of the format before them: earlier programs read it.
_FORMAT, _FORMAT_OF_WEIGHTS = 2, 3
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.int64, torch.int32, torch.int16, torch.uint8)
}
_MAX_BLOCK_BYTES = 1 << 23
_MIN_BLOCK_ROWS, _MAX_BLOCK_ROWS = 1 << 12, 1 << 16


@dataclass(frozen=True)
class Settings:
    """The keys of a configuration that shape a store."""

    target: str
    drop: list[str]
    categorical: list[str]
    missing_values: list[str]
    max_categories: int
    split_column: str | None
    validation_fraction: float
    test_fraction: float
    seed: int
    weight: str | None = None
    numeric_transform: str = "robust"
    hash_buckets: int = 0
    time_column: str | None = None
    group_column: str | None = None
    folds: int | None = None
    fold: int | None = None
    formats: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: DataConfig, *, seed: int) -> Settings:
        """Those of a configuration."""
        return cls(**{name: getattr(data, name) for name in cls.__annotations__ if name != "seed"}, seed=seed)

    def differences(self, other: Settings) -> list[str]:
        """What another configuration says otherwise, as `key is A, the store has B`; the seed is left out."""
        lines = []
        for name, value in asdict(self).items():
            wanted = getattr(other, name)
            same = sorted(value) == sorted(wanted) if isinstance(value, list) else value == wanted
            if not (name == "seed" or same or (self.split_column and name.endswith("_fraction"))):
                lines.append(f"data.{name} is {wanted!r}, the store has {value!r}")
        return lines


@dataclass(frozen=True)
class TensorFile:
    """One tensor of a split, rows one after the other; `width` numbers each, or 0: one number, not a row of them.

    `blocks` holds the SHA-256 of each block of `block_rows` rows; the last block may have fewer.
    """

    dtype: str
    width: int
    blocks: list[str]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return row_bytes(self.dtype, self.width)


def row_bytes(dtype: str, width: int) -> int:
    """Bytes of a row of a tensor."""
    return _DTYPES[dtype].itemsize * max(1, width)


def tensor_files(spec: FeatureSpec, *, weighted: bool) -> dict[str, tuple[str, int]]:
    """Tensors of each split by name, with the dtype and the width of their rows; those without columns are left out."""
    codes = smallest_int(max(spec.category_sizes, default=1))
    tensors = {
        "numeric": (torch.float32, spec.num_numeric),
        "flags": (torch.uint8, spec.num_flags),
        "codes": (codes, spec.num_categorical),
    }
    files = {name: (_name_of(dtype), width) for name, (dtype, width) in tensors.items() if width}
    files |= {"targets": (_name_of(smallest_int(spec.num_classes)), 0), "rows": ("int64", 0)}
    return files | ({"weights": ("float64", 0)} if weighted else {})


def rows_of_block(spec: FeatureSpec) -> int:
    """Rows of a block: a power of two, so that a block begins at a page of memory, and a few MiB."""
    row = max(row_bytes(dtype, width) for dtype, width in tensor_files(spec, weighted=False).values())
    rows = _MAX_BLOCK_ROWS
    while rows > _MIN_BLOCK_ROWS and rows * row > _MAX_BLOCK_BYTES:
        rows //= 2
    return rows


def num_blocks(num_rows: int, block_rows: int) -> int:
    """Blocks of a split."""
    return -(-num_rows // block_rows)


def pack_manifest(content: Mapping[str, Any]) -> bytes:
    """A manifest with its own SHA-256, and with that of the data: of what training sees, not of where it came from."""
    data = {name: content[name] for name in ("format", "block_rows", "rows", "files", "spec")}
    whole = dict(content) | {"data_sha256": _digest(data)}
    return json.dumps(whole | {"sha256": _digest(whole)}, indent=1, ensure_ascii=False).encode()


def manifest_content(
    rows: Mapping[str, int],
    block_rows: int,
    files: Mapping[str, TensorFile],
    spec: FeatureSpec,
    settings: Settings,
    inputs: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What a manifest says."""
    return {
        "format": _FORMAT_OF_WEIGHTS if any(name.endswith(".weights") for name in files) else _FORMAT,
        "block_rows": block_rows,
        "rows": dict(rows),
        "files": {name: asdict(file) for name, file in sorted(files.items())},
        "spec": spec.to_json(),
        "settings": asdict(settings),
        "inputs": list(inputs),
    }


def is_store(path: str | Path) -> bool:
    """Whether a path is a prepared table."""
    return (Path(path) / MANIFEST).is_file()


class Store:
    """A prepared table; opening it checks the manifest and the size of every file. UserError says what is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = _read_manifest(folder / MANIFEST)
        self.sha256: str = content["data_sha256"]
        known = content["settings"]  # those of an earlier program lack what has a default
        self.settings = Settings(**{name: known[name] for name in Settings.__annotations__ if name in known})
        self.spec = _spec_of(content)
        self._format: int = content["format"]
        self.block_rows: int = content["block_rows"]
        self.num_rows: dict[str, int] = content["rows"]
        self.files = {name: TensorFile(**file) for name, file in content["files"].items()}
        for name, file in self.files.items():
            expected = self._rows_of(name) * file.row_bytes
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise UserError(f"{folder / name}: cannot be read: {error.strerror}; {_REMEDY}") from None
            if size != expected:
                raise UserError(f"{folder / name}: has {size:,} bytes instead of {expected:,}; {_REMEDY}")

    def require(self, settings: Settings) -> None:
        """UserError when a configuration asks for other data than those of the store."""
        differences = self.settings.differences(settings)
        if differences:
            raise UserError(
                f"{self.folder}: was prepared with another configuration: {'; '.join(differences)}. "
                "Prepare another store, or set the keys back"
            )

    def tensors(self, split: str) -> dict[str, Tensor]:
        """The tensors of a split, mapped to memory, by name."""
        return {name: self._mapped(f"{split}.{name}") for name in _names(self.files, split)}

    def to_inputs(self, tensors: Mapping[str, Tensor]) -> Inputs:
        """Arguments of a model from some rows of these tensors."""
        if self._format == 1:
            return _inputs_of_format_1(tensors, self.spec)
        count, device = next((len(t), t.device) for t in tensors.values())
        empty = torch.empty((count, 0), device=device)
        return Inputs(*(tensors.get(name, empty) for name in Inputs._fields))

    def verify(
        self, splits: Sequence[str], collectives: Collectives, show: Callable[[int], None] = lambda _bytes: None
    ) -> None:
        """Read the blocks of these splits, each rank its share, and compare their SHA-256; `show` is told the bytes.

        UserError names a damaged block. Raises Stopped when the ranks have agreed to stop.
        """
        blocks = [
            (f"{split}.{name}", number)
            for split in splits
            for name in _names(self.files, split)
            for number in range(len(self.files[f"{split}.{name}"].blocks))
        ]
        first, last = split_evenly(0, len(blocks), collectives.size)[collectives.rank]
        collectives.lockstep((self._verify_block(name, number) for name, number in blocks[first:last]), show)

    def bytes_of(self, splits: Sequence[str]) -> int:
        """Size of the tensors of these splits."""
        return sum(
            self.num_rows[split] * self.files[f"{split}.{name}"].row_bytes
            for split in splits
            for name in _names(self.files, split)
        )

    def _verify_block(self, name: str, number: int) -> int:
        file = self.files[name]
        first = number * self.block_rows
        last = min(first + self.block_rows, self._rows_of(name))
        data = read_block(self.folder / name, file.row_bytes, first, last)
        if hashlib.sha256(data).hexdigest() != file.blocks[number]:
            raise UserError(
                f"{self.folder / name}: block {number} (rows {first + 1:,} to {last:,} of {name.partition('.')[0]}) is "
                f"damaged: its SHA-256 is not that of the manifest; {_REMEDY}"
            )
        return len(data)

    def _mapped(self, name: str) -> Tensor:
        file, num_rows = self.files[name], self._rows_of(name)
        shape = (num_rows, file.width) if file.width else (num_rows,)
        dtype = _DTYPES[file.dtype]
        count = num_rows * max(1, file.width)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.from_file(str(self.folder / name), shared=False, size=count, dtype=dtype).view(shape)

    def _rows_of(self, name: str) -> int:
        return self.num_rows[name.partition(".")[0]]


_REMEDY = "bring the file back from a copy, or prepare the store anew"


def read_block(file: Path, row_bytes: int, first_row: int, last_row: int) -> bytes:
    """The bytes of a run of rows; UserError when the disk does not give them."""
    try:
        with file.open("rb") as stream:
            stream.seek(first_row * row_bytes)
            return stream.read((last_row - first_row) * row_bytes)
    except OSError as error:
        raise UserError(f"{file}: rows {first_row + 1:,} to {last_row:,} cannot be read: {error.strerror}") from None


def _names(files: Mapping[str, TensorFile], split: str) -> Iterator[str]:
    return (name.removeprefix(f"{split}.") for name in files if name.startswith(f"{split}."))


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
        whole = {name: value for name, value in content.items() if name != "sha256"}
        sound = content["sha256"] == _digest(whole)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: cannot be read; {_REMEDY}") from None
    if not sound:
        raise UserError(f"{file}: has another content than was written (SHA-256 differs); {_REMEDY}")
    if content["format"] not in range(1, _FORMAT_OF_WEIGHTS + 1):
        raise UserError(
            f"{file}: is of format {content['format']}, this program reads up to {_FORMAT_OF_WEIGHTS}: "
            "update the program, or prepare the store anew"
        )
    if sys.byteorder != "little":
        raise UserError(f"{file}: a store is little-endian, this machine is not")
    return content


def _spec_of(content: Mapping[str, Any]) -> FeatureSpec:
    if content["format"] == 1:
        return spec_of_encoder(content["encoder"]["description"], content["encoder"]["tensors"])
    return FeatureSpec.from_json(content["spec"])


def _inputs_of_format_1(tensors: Mapping[str, Tensor], spec: FeatureSpec) -> Inputs:
    """Numbers, flags and codes of rows that were stored as dense features, and as `slots` where codes were embedded."""
    features = tensors["features"] if "features" in tensors else tensors["slots"][:, :0].float()
    numeric, flags, one_hot = features.split(
        [spec.num_numeric, spec.num_flags, features.shape[1] - spec.num_numeric - spec.num_flags], 1
    )
    codes = tensors["slots"] if "slots" in tensors else _codes_of_one_hot(one_hot, spec)
    return Inputs(numeric.contiguous(), flags.to(torch.uint8), codes)


def _codes_of_one_hot(one_hot: Tensor, spec: FeatureSpec) -> Tensor:
    codes = one_hot.new_empty((len(one_hot), spec.num_categorical), dtype=torch.int64)
    first = 0
    for index, column in enumerate(spec.categorical):
        hot = one_hot[:, first : first + column.size]
        # Zeros throughout are a code that did not occur in training: any such code gives these zeros again.
        unseen = column.seen_in_training.index(False) if False in column.seen_in_training else 0
        codes[:, index] = torch.where(hot.any(1), hot.argmax(1), unseen)
        first += column.size
    return codes


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
