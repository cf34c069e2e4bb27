"""Write a predictor as a file for other programs, once the file has given the predictor's probabilities."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from dist_train import __version__
from dist_train.data.cells.readings import DURATION
from dist_train.data.encoding.spec import FeatureSpec
from dist_train.data.encoding.unfamiliar import contracts_of
from dist_train.errors import TrainingFault, UserError
from dist_train.risk.calibration import Isotonic, calibration_from_json
from dist_train.run.scoring.partial_scores import require_writable, unwritable
from dist_train.run.scoring.predictor import Predictor
from dist_train.serving.network import ExportableNetwork
from dist_train.serving.onnx_file import (
    exported_program,
    onnx_bytes,
    onnx_inputs,
    refuse_hashed,
    spellings,
    write_pt2,
)
from dist_train.serving.onnx_model import MOMENTS, OUTPUT
from dist_train.serving.triton import write_repository
from dist_train.system.files import TMP_PREFIX
from dist_train.tasks.tabular import TabularTask

FORMAT = 1
TOLERANCE = 1e-6
"""Largest difference of a probability to the predictor's."""
NUM_CHECKED = 1000


def export_model(predictor: Predictor, output: Path, *, triton: bool = False) -> float:
    """Write `.onnx` or `.pt2`, checked against the predictor on 1,000 rows; the largest difference of a probability.

    With `triton` the output is the folder of a model in a Triton model repository, named as the model.

    Raises:
        UserError: the model cannot be exported, a package is not installed, or the output cannot be written.
        TrainingFault: the file has other probabilities than the predictor; nothing is written.
    """
    if triton and output.exists():
        raise UserError(f"{output}: is there already: name a folder that is to be made")
    if not triton:
        require_writable(output, {})
    network = network_of(predictor)
    specs = _specs(predictor)
    metadata = _metadata(predictor, network, specs)
    rows = sample_rows(specs[0], NUM_CHECKED)
    aside = output.resolve().with_name(f"{TMP_PREFIX}{output.name}")
    try:
        if triton or output.suffix.lower() == ".onnx":
            data = onnx_bytes(network, metadata, predictor.config.data.missing_values)
            found = _by_onnxruntime(data, network, rows)
            if triton:
                columns = [(column["name"], column["kind"] == "category") for column in metadata["columns"]]
                write_repository(data, output.name, columns, len(predictor.class_names), aside)
            else:
                aside.write_bytes(data)
        else:
            write_pt2(network, metadata, aside)
            found = _by_torch(network, rows, predictor)
        difference = _largest_difference(found, predictor, typed_rows(rows, specs[0]), output)
        aside.replace(output.resolve())
    except OSError as error:
        raise unwritable(output, error) from None
    finally:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
    return difference


def _largest_difference(
    found: npt.NDArray[np.float64], predictor: Predictor, table: pl.DataFrame, output: Path
) -> float:
    difference = float(np.abs(found - predictor.predict_proba(table)).max())
    if not difference <= TOLERANCE * _steepness(predictor):
        raise TrainingFault(f"{output}: a probability differs by {difference:.1e} from the predictor's")
    return difference


def _steepness(predictor: Predictor) -> float:
    """How many times a calibration enlarges a difference of probabilities: an isotonic function may be steep."""
    content = predictor.calibration if predictor.calibrated else None
    calibration = None if content is None else calibration_from_json(content, "calibration.json")
    if not isinstance(calibration, Isotonic):
        return 1.0
    slopes = [np.diff(y) / np.diff(x) for x, y in zip(calibration.x, calibration.y, strict=True)]
    return 1.0 + len(slopes) * float(max((of_class.max(initial=0) for of_class in slopes), default=0.0))


def network_of(predictor: Predictor) -> ExportableNetwork:
    """The predictor as one module. UserError where it is no model of a table, or has what cannot be exported."""
    specs = _specs(predictor)
    content = predictor.calibration if predictor.calibrated else None
    calibration = None if content is None else calibration_from_json(content, "calibration.json")
    refuse_hashed([column for spec in specs for column in spec.categorical])
    return ExportableNetwork(predictor.members, specs, calibration).eval()


def _specs(predictor: Predictor) -> list[FeatureSpec]:
    specs = [member.task.spec for member in predictor.members if isinstance(member.task, TabularTask)]
    if len(specs) < len(predictor.members):
        raise UserError("only the model of a table can be exported")
    return specs


def _metadata(predictor: Predictor, network: ExportableNetwork, specs: Sequence[FeatureSpec]) -> dict[str, Any]:
    forms = {reading.column: reading.form for spec in specs for reading in spec.readings}
    contracts = contracts_of(specs[0])

    def of_training(name: str) -> dict[str, Any]:
        return contracts[name].to_json() if name in contracts else {}

    columns: list[dict[str, Any]] = [
        {"name": name, "kind": "number", **_form(forms.get(name)), **of_training(name)} for name in network.numbers
    ]
    known: dict[str, dict[str, Any]] = {}
    for column in network.vocabularies:
        found = known.setdefault(column.name, {"categories": {}, "spellings": {}})
        found["categories"] |= dict.fromkeys(column.categories)
        found["spellings"] |= dict.fromkeys(spellings(column, predictor.config.data.missing_values))
    columns += [
        {"name": name, "kind": "category", **of_training(name)} | {key: list(words) for key, words in found.items()}
        for name, found in known.items()
    ]
    return {
        "dist_train": {"format": FORMAT, "version": __version__, "torch": torch.__version__},
        "columns": columns,
        "classes": predictor.class_names,
        "output": OUTPUT,
        "missing_values": predictor.config.data.missing_values,
        "calibration": predictor.calibration if predictor.calibrated else None,
        "fingerprint": predictor.fingerprint,
        "hashes": predictor.hashes,
        "example": sample_rows(specs[0], 4).fill_nan(None).row(0, named=True),
        "python": platform.python_version(),
    }


def _form(form: str | None) -> dict[str, str]:
    if form is None:
        return {}
    unit = "seconds" if form == DURATION else MOMENTS if "," not in form else "the number"
    return {"written_as": form, "unit": unit}


def sample_rows(spec: FeatureSpec, count: int) -> pl.DataFrame:
    """Rows of every kind of cell: usual, extreme, missing and unknown ones; dates and durations in seconds."""
    generator = np.random.default_rng(0)
    columns: dict[str, Any] = {}
    readings = {reading.column: reading for reading in spec.readings}
    features = {column.name: column for column in spec.numeric}
    for name in spec.names[: len(spec.names) - spec.num_categorical]:
        reading = readings.get(name)
        if reading is not None and reading.parts:
            values = np.round((reading.reference or 0.0) - generator.exponential(3e8, count) * 2 + 1e8, 3)
        else:
            values = _numbers(features[name].quantiles, generator, count)
        columns[name] = np.where(generator.random(count) < 0.1, np.nan, values)
        columns[name][0] = np.nan if np.isnan(values[0]) else values[0]
    for column in spec.categorical:
        words = [*column.categories, "", "no such category", " spaced "]
        columns[column.name] = [
            words[0] if i == 0 else words[i] for i in [0, *generator.integers(0, len(words), count - 1)]
        ]
    return pl.DataFrame(columns)


def _numbers(quantiles: Sequence[float], generator: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    known = np.asarray(quantiles or (0.0, 1.0))
    low, high = known[0], known[-1]
    between = np.interp(generator.random(count), np.linspace(0, 1, len(known)), known)
    held = generator.choice(known, count)
    beyond = low + (high - low + 1) * generator.normal(0, 100, count)
    kind = generator.random(count)
    kind[0] = 0.5
    return np.asarray(np.where(kind < 0.2, held, np.where(kind < 0.9, between, beyond)))


def typed_rows(rows: pl.DataFrame, spec: FeatureSpec) -> pl.DataFrame:
    """The rows as a table has them: dates and durations in types of their own, missing cells as null."""
    found = rows.fill_nan(None)
    for reading in spec.readings:
        microseconds = (pl.col(reading.column) * 1e6).round().cast(pl.Int64)
        if reading.parts:
            found = found.with_columns(microseconds.cast(pl.Datetime("us")))
        elif reading.form == DURATION:
            found = found.with_columns(microseconds.cast(pl.Duration("us")))
    return found


def _by_onnxruntime(data: bytes, network: ExportableNetwork, rows: pl.DataFrame) -> npt.NDArray[np.float64]:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("the check needs onnxruntime: pip install 'dist_train[export]'") from None
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([OUTPUT], onnx_inputs(rows, network))[0])


def _by_torch(network: ExportableNetwork, rows: pl.DataFrame, predictor: Predictor) -> npt.NDArray[np.float64]:
    words = predictor.config.data.missing_values
    numbers = torch.from_numpy(rows.select(network.numbers).to_numpy().astype(np.float64))
    tables = [(column.name, spellings(column, words)) for column in network.vocabularies]
    codes = [[table.get(word, 1) for word in rows[name].to_list()] for name, table in tables]
    coded = torch.tensor(codes, dtype=torch.int64).reshape(len(tables), rows.height).T.contiguous()
    with torch.no_grad():
        return np.asarray(exported_program(network).module()(numbers, coded).numpy())
