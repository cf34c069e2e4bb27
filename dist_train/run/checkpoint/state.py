"""Objects <-> bytes: tensors go into a tensor file, everything else into JSON. No code is ever unpickled."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config.compatibility import require_format
from dist_train.run.checkpoint.commit import CorruptCheckpoint, list_parts, read_part

Parts = dict[str, Any]
"""File name -> content: `*.pth` a flat mapping of tensors, `*.json` any JSON value, or bytes, whatever the name.

What was written as bytes is for other programs: it is not among the parts that are read.
"""


_FORMAT_PARTS = {
    "state.json": "checkpoint",
    "model.json": "trained model",
    "ensemble.json": "ensemble",
    "classifier.json": "classifier",
    "calibration.json": "calibration",
}
"""The part that holds the format number, by name -> the kind of artefact."""


class EncodedParts(Mapping[str, bytes]):
    """Parts as the bytes of their files, each made when it is asked for: no two need be in memory at once."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> bytes:
        value = self._parts[name]
        if isinstance(value, bytes):
            return value
        return pack_tensors(value) if name.endswith(".pth") else pack_json(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def encode_parts(parts: Parts) -> EncodedParts:
    """Parts as the bytes of their files."""
    return EncodedParts(parts)


def read_parts(folder: Path) -> Parts:
    """The parts of a committed folder.

    Raises:
        CorruptCheckpoint: the folder does not verify, or a part is not what its name says.
        UserError: its format is not one that this version reads.
    """
    listed = list_parts(folder)

    def read(name: str) -> Any:
        unpack = unpack_tensors if name.endswith(".pth") else unpack_json
        return unpack(read_part(folder, name, *listed[name]), str(folder / name))

    for name, kind in _FORMAT_PARTS.items():
        if name in listed:  # checked first: another version may encode the other parts differently
            content = read(name)
            require_format(kind, content.get("format", 1) if isinstance(content, dict) else None, str(folder))
    return {name: read(name) for name in listed if name.endswith((".pth", ".json")) and "/" not in name}


def decode_parts(encoded: Mapping[str, bytes], source: str) -> Parts:
    """What `encode_parts` made of parts. Raises CorruptCheckpoint: it is anything else."""
    return {
        name: (unpack_tensors if name.endswith(".pth") else unpack_json)(data, f"{source}/{name}")
        for name, data in encoded.items()
    }


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """A flat mapping of tensors as torch.save writes it, on the CPU."""
    stream = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, stream)
    return stream.getvalue()


def unpack_tensors(data: bytes, source: str) -> dict[str, Tensor]:
    """What `pack_tensors` wrote, on the CPU. Nothing in the bytes is executed.

    Raises:
        CorruptCheckpoint: they are anything else.
    """
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly any type for bytes that are no file of tensors
        reason = "it holds code" if "Unsupported" in str(error) or "weights_only" in str(error) else "it cannot be read"
        raise CorruptCheckpoint(f"{source} is not a file of tensors: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise CorruptCheckpoint(f"{source} is not a flat mapping of tensors")
    return content


def pack_json(value: Any) -> bytes:
    """JSON, UTF-8."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode()


def pack_json_line(value: Any) -> bytes:
    """JSON on a line of its own."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def unpack_json(data: bytes, source: str) -> Any:
    """What `pack_json` wrote.

    Raises:
        CorruptCheckpoint: the bytes are anything else.
    """
    try:
        return json.loads(data)
    except ValueError:
        raise CorruptCheckpoint(f"{source} is not JSON") from None


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the bytes of all parameters and buffers in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    own = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{own.dtype} {tuple(own.shape)}".encode())
    digest.update(own.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def with_digests(parts: Parts) -> Parts:
    """The parts with the digest of each tensor in its place, apart from an encoder's few numbers."""
    return {
        name: {key: tensor_sha256(tensor) for key, tensor in part.items()}
        if name.endswith(".pth") and name != "encoder.pth"
        else part
        for name, part in parts.items()
    }
