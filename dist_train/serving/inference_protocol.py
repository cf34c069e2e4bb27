"""Requests of the Open Inference Protocol (version 2 of KServe's) -> records, and what it says of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_train.serving.onnx_model import BadRecord, Column, OnnxModel

_NUMBERS = ("FP64", "FP32", "FP16", "INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8")


def metadata_of(model: OnnxModel, name: str) -> dict[str, Any]:
    """The model's metadata."""
    inputs = [{"name": c.name, "datatype": _datatype(c), "shape": [-1, 1]} for c in model.columns]
    output = {"name": "probabilities", "datatype": "FP64", "shape": [-1, len(model.classes)]}
    parameters = {"classes": model.classes, "hashes": model.metadata["hashes"]}
    return {
        "name": name, "versions": ["1"], "platform": "onnxruntime_onnx", "inputs": inputs, "outputs": [output],
        "parameters": parameters,
    }  # fmt: skip


def to_tensors(model: OnnxModel, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A record as the inputs of a request."""
    return [
        {"name": c.name, "datatype": _datatype(c), "shape": [1, 1], "data": [record[c.name]]} for c in model.columns
    ]


def from_tensors(model: OnnxModel, body: Mapping[str, Any], max_rows: int) -> list[dict[str, Any]]:
    """The inputs of a request as records; null, or an empty text of a category, is a missing cell. Raises BadRecord."""
    inputs = body.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(given, dict) for given in inputs):
        raise BadRecord("the body must be an object with the list `inputs`")
    by_name = {given["name"]: given for given in inputs if isinstance(given.get("name"), str)}
    columns: dict[str, list[Any]] = {}
    for column in model.columns:
        if column.name not in by_name:
            raise BadRecord(f"the input {column.name!r} is not there")
        columns[column.name] = _data(column, by_name[column.name])
    lengths = {len(data) for data in columns.values()}
    if len(lengths) != 1:
        raise BadRecord("the inputs have different numbers of rows")
    (rows,) = lengths
    if not 1 <= rows <= max_rows:
        raise BadRecord(f"a request has 1 to {max_rows:,} rows")
    return [{name: data[row] for name, data in columns.items()} for row in range(rows)]


def _data(column: Column, given: Mapping[str, Any]) -> list[Any]:
    data, shape = given.get("data"), given.get("shape")
    if not isinstance(data, list):
        raise BadRecord(f"input {column.name!r}: `data` must be a list: binary data are not read")
    data = [cell[0] if isinstance(cell, list) and len(cell) == 1 else cell for cell in data]
    if shape not in ([len(data), 1], [len(data)]):
        raise BadRecord(f"input {column.name!r}: `shape` must be [rows, 1], of as many rows as `data` has")
    allowed = ("BYTES", "BOOL", *_NUMBERS) if column.is_text else _NUMBERS + (("BYTES",) if column.is_moment else ())
    if given.get("datatype") not in allowed:
        raise BadRecord(f"input {column.name!r}: `datatype` must be {_datatype(column)}")
    return data


def _datatype(column: Column) -> str:
    return "BYTES" if column.is_text else "FP64"
