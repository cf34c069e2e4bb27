"""A predictor as one module of torch that can be exported: numbers and category codes -> probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_train.data.encoding.spec import CategoricalColumn, FeatureSpec
from dist_train.risk.calibration import SMALLEST, Calibration, Isotonic, Temperature, Vector
from dist_train.run.scoring.members import Member
from dist_train.serving.encoding import ByQuantiles, DateParts, Robust
from dist_train.training.precision import dtype_of


class ExportableNetwork(nn.Module):
    """The mean over members of their probabilities, calibrated.

    Shapes: numbers (rows, columns) float64, NaN where missing, in the order of `numbers`; codes (rows, columns) int64
    in the order of `vocabularies` -> (rows, classes) float64. Dates are seconds since 1970-01-01 UTC, durations in
    seconds.
    """

    def __init__(
        self, members: Sequence[Member], specs: Sequence[FeatureSpec], calibration: Calibration | None
    ) -> None:
        super().__init__()
        self.numbers = list(dict.fromkeys(name for spec in specs for name in _numeric_columns(spec)))
        self.vocabularies = list(dict.fromkeys(column for spec in specs for column in spec.categorical))
        self.members = nn.ModuleList(
            _Member(member, spec, self.numbers, self.vocabularies) for member, spec in zip(members, specs, strict=True)
        )
        self.calibration = None if calibration is None else _Calibrated(calibration)

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Probabilities of the rows."""
        probabilities = self.members[0](numbers, codes)
        for member in list(self.members)[1:]:
            probabilities = probabilities + member(numbers, codes)
        if len(self.members) > 1:
            probabilities = probabilities / len(self.members)
        calibrated: Tensor = probabilities if self.calibration is None else self.calibration(probabilities)
        return calibrated


def _numeric_columns(spec: FeatureSpec) -> list[str]:
    return spec.names[: len(spec.names) - spec.num_categorical]


class _Member(nn.Module):
    """A member with its encoder, which treats all columns together: an exporter takes its time for each operation."""

    def __init__(
        self, member: Member, spec: FeatureSpec, numbers: Sequence[str], vocabularies: Sequence[CategoricalColumn]
    ) -> None:
        super().__init__()
        self.model = member.model
        self.dtype = dtype_of(member.task.config.train.precision)
        self.num_numeric, self.num_flags = spec.num_numeric, spec.num_flags
        dates = [reading for reading in spec.readings if reading.parts]
        parts = [(reading.column, part) for reading in dates for part in reading.parts]
        places = {name: index for index, name in enumerate(numbers)} | {
            f"{name}: {part}": len(numbers) + index for index, (name, part) in enumerate(parts)
        }
        self.dates = DateParts(dates, numbers) if dates else None
        self.scaling = (ByQuantiles if spec.numeric and spec.numeric[0].transform == "quantile" else Robust)(spec)
        self._keep("places", [places[column.name] for column in spec.numeric])
        self._keep("flagged", [index for index, column in enumerate(spec.numeric) if column.has_missing_flag])
        self._keep("codes", [vocabularies.index(column) for column in spec.categorical])

    def _keep(self, name: str, values: Sequence[int]) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)

    def forward(self, numbers: Tensor, codes: Tensor) -> Tensor:
        """Probabilities of the member."""
        numeric = flags = numbers[:, :0]
        if self.num_numeric:
            found = numbers if self.dates is None else torch.cat([numbers, self.dates(numbers)], 1)
            values = found.index_select(1, self.get_buffer("places"))
            missing = values.isnan()
            # Numbers are put in the place of missing ones beforehand, so that nothing is computed of NaN.
            numeric = torch.where(missing, 0.0, self.scaling(torch.where(missing, 0.0, values)))
            flags = missing.index_select(1, self.get_buffer("flagged")) if self.num_flags else flags
        own_codes = codes.index_select(1, self.get_buffer("codes"))
        logits = self.model(numeric.to(self.dtype), flags.to(torch.uint8), own_codes)
        probabilities: Tensor = logits.double().softmax(-1)
        return probabilities if probabilities.ndim == 2 else probabilities.mean(1)


class _Calibrated(nn.Module):
    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        self.calibration = calibration
        corners = calibration if isinstance(calibration, Isotonic) else Isotonic((), ())
        for name, values in (("x", corners.x), ("y", corners.y)):
            for index, of_class in enumerate(values):
                self.register_buffer(f"{name}{index}", torch.tensor(of_class, dtype=torch.float64), persistent=False)

    def forward(self, probabilities: Tensor) -> Tensor:
        calibration = self.calibration
        if isinstance(calibration, Isotonic):
            shares = torch.stack(
                [
                    _interpolated(probabilities[:, index], getattr(self, f"x{index}"), getattr(self, f"y{index}"))
                    for index in range(len(calibration.x))
                ],
                1,
            )
            return shares / shares.sum(1, keepdim=True)
        logits = (probabilities + SMALLEST).log()
        if isinstance(calibration, Temperature):
            return probabilities if calibration.temperature == 1 else (logits / calibration.temperature).softmax(-1)
        assert isinstance(calibration, Vector)
        scales, biases = (torch.tensor(v, dtype=torch.float64) for v in (calibration.scales, calibration.biases))
        return (logits * scales + biases).softmax(-1)


def _interpolated(values: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if len(x) == 1:
        return torch.zeros_like(values) + y[0]
    lower = ((x <= values[:, None]).sum(1) - 1).clamp(0, len(x) - 2)
    slope = (y[lower + 1] - y[lower]) / (x[lower + 1] - x[lower])
    inside = y[lower] + slope * (values - x[lower])
    return torch.where(values <= x[0], y[0], torch.where(values >= x[-1], y[-1], inside))
