"""An exported ONNX file behind a function: records in, probabilities out. It imports neither torch nor polars."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_train.data.encoding.contract import ColumnContract
from dist_train.errors import UserError

Inputs = dict[str, np.ndarray[Any, Any]]
OUTPUT = "probabilities"
_LARGEST = float(np.finfo(np.float32).max)
MOMENTS = "seconds since 1970-01-01 UTC"


class BadRecord(ValueError):
    """A record that cannot be scored; the message names row and column, and no value of the record."""


@dataclass(frozen=True)
class Column:
    """An input, a number or a text, and what it was in the training rows."""

    name: str
    is_text: bool
    is_moment: bool
    contract: ColumnContract

    def cell(self, value: object, row: int) -> float | str:
        """The value as the file takes it. Raises BadRecord."""
        if value is None:
            return "" if self.is_text else math.nan
        if self.is_text:
            return self._text(value, row)
        if self.is_moment and isinstance(value, str):
            value = self._seconds(value, row)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            wanted = "a number, or a date in ISO 8601" if self.is_moment else "a number"
            raise BadRecord(f"row {row}, column {self.name!r}: must be {wanted}, or null")
        if not abs(value) <= _LARGEST:
            raise BadRecord(f"row {row}, column {self.name!r}: the number is beyond the range of float32")
        return float(value)

    def _text(self, value: object, row: int) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (int, float)):
            return str(value)
        if not isinstance(value, str):
            raise BadRecord(f"row {row}, column {self.name!r}: must be a text, a number, a boolean or null")
        if "\0" in value or not _is_unicode(value):
            raise BadRecord(f"row {row}, column {self.name!r}: the text is no valid Unicode text")
        return value

    def _seconds(self, value: str, row: int) -> float:
        try:
            moment = datetime.fromisoformat(value)
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            raise BadRecord(f"row {row}, column {self.name!r}: must be a date in ISO 8601, seconds, or null") from None


class OnnxModel:
    """The model of a file that `dist-train export` wrote.

    Raises:
        UserError: the file is none of those, or onnxruntime is not installed.
    """

    def __init__(self, file: Path) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UserError("ONNX needs onnxruntime: pip install 'dist_train[serve]'") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # requests are what is computed side by side
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            properties = self._session.get_modelmeta().custom_metadata_map
            self.metadata: dict[str, Any] = {name: json.loads(value) for name, value in properties.items()}
            self.classes: list[str] = self.metadata["classes"]
            self.columns = [_column(content, self.metadata) for content in self.metadata["columns"]]
        except Exception as error:
            raise UserError(f"{file}: is no file of `dist-train export`: {str(error).splitlines()[0]}") from None

    @property
    def example(self) -> dict[str, Any]:
        """A record of the columns, as the metadata have it."""
        return dict(self.metadata["example"])

    def cells(self, records: Sequence[Mapping[str, Any]]) -> list[list[float | str]]:
        """The cells of each column. Raises BadRecord: a record is none, lacks a column, or a value does not fit."""
        for row, record in enumerate(records):
            if not isinstance(record, Mapping):
                raise BadRecord(f"row {row}: must be an object with a value for each column")
            for column in self.columns:
                if column.name not in record:
                    raise BadRecord(f"row {row}: the column {column.name!r} is not there (null is a missing cell)")
        return [
            [column.cell(record[column.name], row) for row, record in enumerate(records)] for column in self.columns
        ]

    def problems(self, cells: Sequence[Sequence[float | str]]) -> list[dict[str, Any]]:
        """The cells that differ from those of the training rows: row, column and how."""
        return [
            {"row": row, "column": column.name, "problem": problem}
            for column, of_column in zip(self.columns, cells, strict=True)
            for row, cell in enumerate(of_column)
            if (problem := column.contract.problem(cell)) is not None
        ]

    def inputs(self, cells: Sequence[Sequence[float | str]]) -> Inputs:
        """The inputs of the file, (rows, 1) each."""
        return {
            column.name: np.array(of_column, dtype=object if column.is_text else np.float64).reshape(-1, 1)
            for column, of_column in zip(self.columns, cells, strict=True)
        }

    def probabilities(self, inputs: Inputs) -> npt.NDArray[np.float64]:
        """Probabilities, (rows, classes), in the order of `classes`."""
        return np.asarray(self._session.run([OUTPUT], inputs)[0])


def _column(content: Mapping[str, Any], metadata: Mapping[str, Any]) -> Column:
    is_text, is_moment = content["kind"] == "category", content.get("unit") == MOMENTS
    known = frozenset(content.get("spellings", ())) | frozenset(metadata["missing_values"]) if is_text else None
    told = {key: value for key, value in content.items() if key != "range" or not is_moment}
    return Column(content["name"], is_text, is_moment, ColumnContract.from_json(told, known))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
