"""Tensors and JSON survive to the bit; anything else is damage, and code in it does not run."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.run.checkpoint.commit import CorruptCheckpoint, commit
from dist_train.run.checkpoint.state import (
    encode_parts,
    pack_json,
    pack_tensors,
    read_parts,
    unpack_json,
    unpack_tensors,
    weights_sha256,
)

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 5)], ids=str)
def test_tensors_come_back_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    back = unpack_tensors(pack_tensors({"a.b/c": tensor}), "x.pth")["a.b/c"]
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert _bytes(back) == _bytes(tensor)


def test_special_values_views_and_parameters() -> None:
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    view = torch.arange(12.0).view(3, 4).T[1:]
    given = {"special": special, "view": view, "parameter": torch.nn.Parameter(torch.ones(2)), "again": special}
    data = pack_tensors(given)
    back = unpack_tensors(data, "x.pth")
    assert all(_bytes(back[name]) == _bytes(tensor.detach()) for name, tensor in given.items())
    assert not any(tensor.requires_grad for tensor in back.values())
    assert pack_tensors(given) == data
    assert len(pack_tensors({"slice": torch.zeros(1_000_000)[:2]})) < 5_000  # not the storage behind it


def test_json_comes_back_and_is_strict() -> None:
    value = {"text": "Größe", "numbers": [1, 0.1, 1e300, 5e-324], "none": None}
    assert unpack_json(pack_json(value), "x.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack_json({"loss": float("nan")})
    with pytest.raises(CorruptCheckpoint, match=r"x\.json is not JSON"):
        unpack_json(b"{", "x.json")


class Intruder:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _malicious(marker: Path) -> dict[str, bytes]:
    new, old = io.BytesIO(), io.BytesIO()
    torch.save({"w": Intruder(marker)}, new)
    torch.save({"w": Intruder(marker)}, old, _use_new_zipfile_serialization=False)
    return {"torch": new.getvalue(), "old torch": old.getvalue(), "pickle": pickle.dumps(Intruder(marker))}


@pytest.mark.parametrize("kind", ["torch", "old torch", "pickle"])
def test_code_in_a_file_of_tensors_does_not_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "was here"
    data = _malicious(marker)[kind]
    torch.load(io.BytesIO(data), weights_only=False) if kind != "pickle" else pickle.loads(data)
    assert marker.exists(), "the trap itself works"
    marker.rmdir()
    with pytest.raises(CorruptCheckpoint, match=r"model\.pth is not a file of tensors"):
        unpack_tensors(data, "model.pth")
    commit(tmp_path / "one", {"model.pth": data})  # with a manifest that vouches for it
    with pytest.raises(CorruptCheckpoint, match=r"one/model\.pth is not a file of tensors"):
        read_parts(tmp_path / "one")
    assert not marker.exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {"a": {"b": torch.ones(1)}}, torch.ones(2), None])
def test_only_a_flat_mapping_of_tensors_is_one(content: Any) -> None:
    stream = io.BytesIO()
    torch.save(content, stream)
    with pytest.raises(CorruptCheckpoint, match="flat mapping"):
        unpack_tensors(stream.getvalue(), "x.pth")


def test_garbage_for_a_file_of_tensors_is_damage_and_nothing_worse() -> None:
    draw = random.Random(0)
    whole = pack_tensors({"w": torch.ones(3), "b": torch.zeros(2, 2)})
    samples = [b"", b"PK", b"\x80\x02", struct.pack("<q", 7), *(whole[: draw.randrange(len(whole))] for _ in range(40))]
    samples += [draw.randbytes(draw.randrange(200)) for _ in range(40)]
    for data in samples:
        with pytest.raises(CorruptCheckpoint):
            unpack_tensors(data, "x.pth")
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            assert all(isinstance(tensor, Tensor) for tensor in unpack_tensors(bytes(data), "x.pth").values())
        except CorruptCheckpoint:
            continue


def test_parts_are_written_by_their_names(tmp_path: Path) -> None:
    parts = {"model.pth": {"w": torch.ones(2, dtype=torch.bfloat16)}, "state.json": {"step": 3}}
    commit(tmp_path / "one", encode_parts(parts))
    back = read_parts(tmp_path / "one")
    assert back["state.json"] == {"step": 3}
    assert torch.equal(back["model.pth"]["w"], parts["model.pth"]["w"])


def test_weights_sha256_is_the_digest_of_all_bytes_in_name_order() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    digest = hashlib.sha256()
    for name in sorted(model.state_dict()):
        digest.update(_bytes(model.state_dict()[name]))
    assert weights_sha256(model.state_dict()) == digest.hexdigest()
    assert weights_sha256(dict(reversed(model.state_dict().items()))) == digest.hexdigest()
    flat = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3, dtype=torch.int64), "c": torch.zeros(0)}
    assert weights_sha256(flat) == hashlib.sha256(struct.pack("<qff", 3, 1.0, 2.0)).hexdigest()
    flat["b"][1] = torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))
    assert weights_sha256(flat) != hashlib.sha256(struct.pack("<qff", 3, 1.0, 2.0)).hexdigest()
