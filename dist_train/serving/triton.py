"""A model repository of the Triton Inference Server: a folder with config.pbtxt and the ONNX file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

MAX_ROWS = 65_536
"""Largest number of rows of one request."""


def write_repository(data: bytes, name: str, inputs: Sequence[tuple[str, bool]], classes: int, folder: Path) -> None:
    """The model `name` in a folder that is not there yet; `inputs` are names, and whether they are texts.

    Names are written as JSON writes strings, which the text format of protocol buffers reads.
    """
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(data)
    declared = [_tensor("input", column, "TYPE_STRING" if text else "TYPE_FP64", 1) for column, text in inputs]
    lines = [
        f"name: {json.dumps(name, ensure_ascii=False)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_ROWS}",
        *declared,
        _tensor("output", "probabilities", "TYPE_FP64", classes),
        "dynamic_batching { }",
    ]
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")


def _tensor(kind: str, name: str, dtype: str, width: int) -> str:
    return f"{kind} [ {{ name: {json.dumps(name, ensure_ascii=False)} data_type: {dtype} dims: [ {width} ] }} ]"
