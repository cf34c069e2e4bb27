"""The encoder of numeric columns in operations of torch that exporters know, all columns of a table together."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from dist_train.data.cells.dates import PARTS, SECONDS_OF_A_DAY, date_part
from dist_train.data.cells.readings import Reading
from dist_train.data.encoding.scaling import LARGEST_NORMAL
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.serving.normal_quantile import normal_quantile

ALL_PARTS = [part for parts in PARTS for part in parts]
_STRIDE = 16
_MINUTES = 1440


class Robust(nn.Module):
    """`scaling.scaled` with the transform `robust`: (rows, features) float64 -> the same shape."""

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        _keep(self, "median", [column.median for column in spec.numeric])
        _keep(self, "scale", [column.scale for column in spec.numeric])

    def forward(self, values: Tensor) -> Tensor:
        """Scaled numbers."""
        centred = (values - self.get_buffer("median")) * self.get_buffer("scale")
        third = centred / 3
        return centred / torch.sqrt(1 + third * third)


class ByQuantiles(nn.Module):
    """`scaling.scaled` with the transform `quantile`: (rows, features) float64 -> the same shape.

    ONNX has no binary search. The interval of a number is found in two steps: among each 16th quantile of its column,
    then among the 16 that follow it.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        width = max((len(column.quantiles) for column in spec.numeric), default=0) or 2
        tables = [np.asarray(column.quantiles or [0.0] * width) for column in spec.numeric]
        self.last = width - 1
        blocks = -(-width // _STRIDE)
        padded = np.full((len(tables), blocks * _STRIDE), np.inf)
        padded[:, :width] = tables
        _keep(self, "coarse", padded[:, _STRIDE - 1 :: _STRIDE])
        _keep(self, "fine", padded.reshape(-1, _STRIDE))
        _keep(self, "first_block", np.arange(len(tables)) * blocks, torch.int64)
        self.last_block = blocks - 1
        quantiles = np.stack(tables)
        middles = np.stack([_middles(table) for table in tables])
        low, high = quantiles[:, :-1], quantiles[:, 1:]
        step = np.where(high > low, high - low, 1.0)
        _keep(self, "intervals", np.stack([low, high, step, middles[:, 1:]], 2).reshape(-1, 4))
        _keep(self, "first", np.arange(len(tables)) * self.last, torch.int64)
        _keep(self, "smallest", quantiles[:, 0])
        _keep(self, "largest", quantiles[:, -1])
        _keep(self, "bound", [LARGEST_NORMAL if column.scale else 0.0 for column in spec.numeric])

    def forward(self, values: Tensor) -> Tensor:
        """Quantiles of the normal distribution."""
        block = (self.get_buffer("coarse") < values.unsqueeze(2)).to(torch.int64).sum(2).clamp(max=self.last_block)
        row = embedding(block + self.get_buffer("first_block"), self.get_buffer("fine"))
        below = block * _STRIDE + (row < values.unsqueeze(2)).to(torch.int64).sum(2)
        before = below.clamp(1, self.last) - 1
        low, high, step, at_high = embedding(before + self.get_buffer("first"), self.get_buffer("intervals")).unbind(2)
        found = torch.where(values == high, at_high, before + (values - low) / step)
        found = torch.where(values <= self.get_buffer("smallest"), 0.0, found)
        found = torch.where(values >= self.get_buffer("largest"), float(self.last), found)
        normal, bound = normal_quantile(found / self.last), self.get_buffer("bound")
        return torch.minimum(torch.maximum(normal, -bound), bound)


def _middles(quantiles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of each quantile: the middle of the places of those that are the same number."""
    sides = (np.searchsorted(quantiles, quantiles, side=side) for side in ("left", "right"))
    return np.asarray((sum(sides) - 1) / 2)


class DateParts(nn.Module):
    """The parts of dates: numbers (rows, columns) in seconds -> (rows, parts) float64, NaN where a date is missing.

    The calendar is Hinnant's algorithm (2013, "chrono-Compatible Low-Level Date Algorithms") of whole days. The parts
    are those of each reading, in their order. The sine of a month, a weekday or a whole minute is looked up: libraries
    round it differently, and a quantile of the training rows may be just that number.
    """

    def __init__(self, readings: Sequence[Reading], columns: Sequence[str]) -> None:
        super().__init__()
        _keep(self, "dates", [columns.index(reading.column) for reading in readings], torch.int64)
        _keep(self, "reference", [reading.reference or 0.0 for reading in readings])
        moments = {
            "month": [datetime(1970, month, 1, tzinfo=UTC).timestamp() for month in range(1, 13)],
            "weekday": [datetime(1970, 1, 5 + day, tzinfo=UTC).timestamp() for day in range(7)],
            "hour": [60.0 * minute for minute in range(_MINUTES)],
        }
        for name, buffer in (("month", "months"), ("weekday", "weekdays"), ("hour", "minutes")):
            seconds = pl.Series(moments[name], dtype=pl.Float64)
            _keep(self, buffer, np.stack([date_part(seconds, f"{name} {of}", 0.0) for of in ("sine", "cosine")], 1))
        wanted = [
            ALL_PARTS.index(part) * len(readings) + index for index, reading in enumerate(readings)
            for part in reading.parts
        ]  # fmt: skip
        _keep(self, "wanted", wanted, torch.int64)

    def forward(self, numbers: Tensor) -> Tensor:
        """Parts of the dates."""
        given = numbers.index_select(1, self.get_buffer("dates"))
        missing = given.isnan()
        seconds = torch.where(missing, 0.0, given)
        days = torch.floor((seconds * 1e6).round() / 1e6 / SECONDS_OF_A_DAY)  # the calendar is of whole microseconds
        year, month, day = _civil(days)
        of_day = _remainder(seconds, SECONDS_OF_A_DAY)
        minute = torch.floor(of_day / 60)
        turns = (of_day / SECONDS_OF_A_DAY * (2 * torch.pi)).unsqueeze(2)
        hours = torch.where(
            (of_day == minute * 60).unsqueeze(2),
            embedding(minute.long(), self.get_buffer("minutes")),
            torch.cat([torch.sin(turns), torch.cos(turns)], 2),
        )
        months = embedding(month.long() - 1, self.get_buffer("months"))
        weekdays = embedding(_remainder(days + 3, 7.0).long(), self.get_buffer("weekdays"))  # 1970-01-01: a Thursday
        since = (seconds - self.get_buffer("reference")) * (1 / SECONDS_OF_A_DAY)  # as polars divides
        parts = [since, year, *months.unbind(2), day, *weekdays.unbind(2), *hours.unbind(2)]
        known = torch.cat([torch.where(missing, torch.nan, part) for part in parts], 1)
        return known.index_select(1, self.get_buffer("wanted"))


def _civil(days: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Year, month and day of the proleptic Gregorian calendar, of days since 1970-01-01."""
    shifted = days + 719468
    era = torch.floor(shifted / 146097)
    of_era = shifted - era * 146097
    year_of_era = torch.floor(
        (of_era - torch.floor(of_era / 1460) + torch.floor(of_era / 36524) - torch.floor(of_era / 146096)) / 365
    )
    of_year = of_era - (365 * year_of_era + torch.floor(year_of_era / 4) - torch.floor(year_of_era / 100))
    shifted_month = torch.floor((5 * of_year + 2) / 153)
    day = of_year - torch.floor((153 * shifted_month + 2) / 5) + 1
    month = torch.where(shifted_month < 10, shifted_month + 3, shifted_month - 9)
    year = year_of_era + era * 400 + (month <= 2).double()
    return year, month, day


def _remainder(values: Tensor, divisor: float) -> Tensor:
    return values - divisor * torch.floor(values / divisor)


def _keep(module: nn.Module, name: str, values: object, dtype: torch.dtype = torch.float64) -> None:
    module.register_buffer(name, torch.tensor(np.asarray(values), dtype=dtype), persistent=False)
