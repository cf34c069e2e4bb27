"""Runs side by side: what their configurations differ in, their metrics and curves, and differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import device_here, world_from_environment
from dist_train.errors import UserError
from dist_train.risk.beside import log_losses
from dist_train.risk.intervals import bootstrap_intervals
from dist_train.run.checkpoint.run_folder import RunFolder, opened_run
from dist_train.run.reporting import curves_of, summary_of
from dist_train.run.scoring.predictions import weights_of
from dist_train.run.scoring.predictor import Predictor
from dist_train.system.console import log

Floats = npt.NDArray[np.float64]

REPEATS = 200
METRICS = ("loss", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "brier", "ece")
OF_THE_RUN = ("steps", "best_step", "parameters", "samples_per_second", "world_size")
# Keys that say where a run lies and what it says meanwhile, not what is trained.
_NAMES = ("run.name", "run.dir", "run.resume", "run.force", "wandb.", "log.", "report.")


def comparison_of(folders: Sequence[Path]) -> dict[str, Any]:
    """What the commands and the page show of finished runs, as JSON values; the first run is the one compared with.

    Raises:
        UserError: a folder is no finished run, or is named twice.
    """
    opened = [opened_run(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice: name each run once")
    names = _names([folder for folder, _ in opened])
    summaries = [summary_of(folder) for folder, _ in opened]
    configurations = [dict(_flat(config)) for _, config in opened]
    scored = _scored([folder.path for folder, _ in opened], summaries)
    return {
        "runs": names,
        "configuration": _side_by_side(configurations),
        "metrics": {split: _metrics([summary.get(split) for summary in summaries]) for split in ("valid", "test")},
        "of_the_run": {key: [summary.get(key) for summary in summaries] for key in OF_THE_RUN},
        "curves": {name: curves_of(folder.metrics) for name, (folder, _) in zip(names, opened, strict=True)},
        "differences": _differences(names, scored, opened[0][1].run.seed),
    }


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """Names of the folders; their paths where two have the same name."""
    short = [folder.path.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder.path) for folder in folders]


def _flat(config: JobConfig) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []

    def walk(value: Any, place: str) -> None:
        if isinstance(value, Mapping) and place.count(".") < 2 and (value or not place):
            for name, item in value.items():
                walk(item, f"{place}.{name}" if place else str(name))
        else:
            found.append((place, value))

    walk(asdict(config), "")
    return found


def _side_by_side(configurations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`different`: key -> the values of the runs, None where a run has no such key; `same`: key -> the value of all."""
    keys = sorted({key for flat in configurations for key in flat if not key.startswith(_NAMES)})
    values = {key: [flat.get(key) for flat in configurations] for key in keys}
    different = {key: of_runs for key, of_runs in values.items() if any(v != of_runs[0] for v in of_runs)}
    return {"different": different, "same": {key: of[0] for key, of in values.items() if key not in different}}


def _metrics(of_runs: Sequence[Mapping[str, Any] | None]) -> dict[str, list[float | None]]:
    """Metrics of the model's own probabilities; `calibrated loss` is that of the calibrated ones."""
    found: dict[str, list[float | None]] = {}
    for name in METRICS:
        found[name] = [metrics.get(name) if metrics else None for metrics in of_runs]
    found["calibrated loss"] = [((metrics or {}).get("calibrated") or {}).get("loss") for metrics in of_runs]
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _scored(
    folders: Sequence[Path], summaries: Sequence[Mapping[str, Any]]
) -> list[tuple[Floats, Floats, Floats] | str]:
    """Of each run its shipped probabilities of the test rows, their classes and weights; or why there are none."""
    found: list[tuple[Floats, Floats, Floats] | str] = []
    for folder, summary in zip(folders, summaries, strict=True):
        if summary.get("test") is None:
            found.append("it has no test rows")
        elif summary["data_sha256"] != summaries[0]["data_sha256"]:
            found.append("its data are others than those of the first run")
        else:
            try:
                found.append(_of_run(folder))
            except UserError as mistake:
                found.append(str(mistake))
    return found


def _of_run(folder: Path) -> tuple[Floats, Floats, Floats] | str:
    device = device_here(opened_run(folder)[1].runtime.device)
    predictor = Predictor(folder, Collectives(world_from_environment({}, device=device)))
    scored = predictor.scored_split("test")
    if scored is None:
        return "it has no test rows"
    predicted, rows = scored
    assert predicted is not None  # in a world of one
    order = rows.row_numbers.cpu().argsort().numpy()
    shipped = predictor.shipped(predicted).numpy()
    numbered = np.stack([rows.row_numbers.cpu().numpy(), rows.targets.cpu().numpy()], axis=1)
    return shipped[order], numbered[order], weights_of(rows)[order]


def _differences(
    names: Sequence[str], scored: Sequence[tuple[Floats, Floats, Floats] | str], seed: int
) -> list[dict[str, Any]]:
    """Of each run but the first: its log loss and accuracy on the test rows less those of the first, with intervals.

    The rows of both are the same, and drawn together: the intervals are those of paired differences.
    """
    first, lines = scored[0], []
    for name, other in zip(names[1:], scored[1:], strict=True):
        line: dict[str, Any] = {"run": name, "against": names[0]}
        if isinstance(first, str) or isinstance(other, str):
            reason = f"{names[0]}: {first}" if isinstance(first, str) else f"{name}: {other}"
        elif not np.array_equal(first[1], other[1]) or first[0].shape != other[0].shape:
            reason = f"{name}: its test rows are others than those of the first run"
        else:
            lines.append(line | _paired(first, other[0], seed))
            continue
        log.warning("no differences on test rows: %s", reason)
        lines.append(line | {"reason": reason})
    return lines


def _paired(first: tuple[Floats, Floats, Floats], other: Floats, seed: int) -> dict[str, Any]:
    shipped, numbered, weights = first
    targets = numbered[:, 1].astype(np.int64)
    of_rows = {
        "loss": log_losses(other, targets) - log_losses(shipped, targets),
        "accuracy": (other.argmax(1) == targets).astype(float) - (shipped.argmax(1) == targets),
    }

    def means(drawn: Floats) -> dict[str, float | None]:
        return {name: float(np.average(values, weights=drawn)) for name, values in of_rows.items()}

    intervals = bootstrap_intervals(means, weights, repeats=REPEATS, seed=seed, purpose="comparison")
    found = means(weights)
    return {name: {"difference": found[name], "interval": intervals[name]} for name in of_rows}
