"""The report on a trained run: its rows are scored, analysed, and written as report.json, report.html and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dist_train import __version__
from dist_train.config.compatibility import FORMATS, require_format
from dist_train.config.schema import JobConfig, ReportConfig
from dist_train.data.stores.store import is_store
from dist_train.distributed.collectives import Collectives
from dist_train.errors import UserError, os_errors_as_faults
from dist_train.risk.analysis import SPLITS, ScoredRows, analysis_of, positive_class
from dist_train.risk.columns import typed
from dist_train.risk.figures import figures_of
from dist_train.risk.page import page_of
from dist_train.run.checkpoint.run_folder import RunFolder, opened_run
from dist_train.run.checkpoint.state import pack_json
from dist_train.run.scoring.influence import influence_of
from dist_train.run.scoring.predictions import weights_of
from dist_train.run.scoring.predictor import Predictor
from dist_train.system.console import log
from dist_train.system.files import write_atomically
from dist_train.tasks.base import HasTable

POINTS_OF_A_CURVE = 200
Content = dict[str, Any]
"""Content of report.json."""


def report_content(folder: RunFolder, config: JobConfig, predictor: Predictor, report: ReportConfig) -> Content | None:
    """Every number of the report on a finished run, on rank 0; None on the other ranks. `config` is the run's own.

    Raises:
        UserError: the run is not finished, its data are not there, or `report` names a class or a column that is not.
    """
    collectives = predictor.collectives
    summary = collectives.on_rank_zero(lambda: summary_of(folder))
    scored = {split: _scored(predictor, split) for split in SPLITS}
    positive = collectives.on_rank_zero(lambda: _positive(scored["train"], predictor, report))
    influence = influence_of(predictor, report, config.run.seed, positive)

    def analyse() -> Content:
        tables = _tables(predictor, config, report)
        rows = {split: _with_table(found, tables) for split, found in scored.items() if found is not None}
        analysis = analysis_of(rows, predictor.class_names, report, seed=config.run.seed)
        return {
            "format": FORMATS["report"],
            "settings": asdict(report),
            "card": _card(config, summary, predictor, rows),
            "training_curves": curves_of(folder.metrics),
            **_plain(analysis | influence),
        }

    with collectives.heartbeat.phase("report"):
        contents: list[Content] = []
        collectives.on_rank_zero(lambda: contents.append(analyse()))
    return contents[0] if contents else None


def write_report(folder: RunFolder, content: Content) -> None:
    """report.json, report.html and figures/*.png in the run folder, on rank 0."""

    def write() -> None:
        figures = figures_of(content)
        pictures = folder.path / "figures"
        pictures.mkdir(exist_ok=True)
        for name, (_, _, png) in figures.items():
            write_atomically(pictures / f"{name}.png", png)
        write_atomically(folder.path / "report.html", page_of(content, figures).encode())
        write_atomically(folder.path / "report.json", pack_json(content))  # last: it says that the report is whole

    os_errors_as_faults(write, "the report")
    log.info("report in %s", folder.path / "report.html")


def report_run(folder: RunFolder, config: JobConfig, predictor: Predictor, report: ReportConfig) -> Content | None:
    """Make the report on a run and write it; its numbers on rank 0. Raises as `report_content`."""
    content = report_content(folder, config, predictor, report)
    predictor.collectives.on_rank_zero(lambda: write_report(folder, content) if content is not None else None)
    return content


def report_once(folder: RunFolder, summary: Mapping[str, Any], collectives: Collectives) -> None:
    """The report on a run that has ended, unless it has one of the same weights; a mistake in its keys is a warning."""

    def is_there() -> bool:
        try:
            return bool(read_report(folder)["card"]["weights_sha256"] == summary["weights_sha256"])
        except (UserError, KeyError, TypeError):
            return False

    if collectives.on_rank_zero(is_there):
        return
    config = collectives.on_rank_zero(lambda: opened_run(folder.path)[1])
    try:
        report_run(folder, config, Predictor(folder.path, collectives), config.report)
    except UserError as mistake:  # the run itself is whole
        if collectives.is_main:
            log.warning("the report is not written: %s", mistake)


def read_report(folder: RunFolder) -> Content:
    """The numbers of a report that was written.

    Raises:
        UserError: there is none, or this version does not read its format.
    """
    file = folder.path / "report.json"
    try:
        content: Content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{file}: cannot be read: dist-train report {folder.path} writes it") from None
    require_format("report", content.get("format"), str(file))
    return content


def differences(recorded: Any, made: Any, place: str = "") -> Iterator[str]:
    """Numbers and texts of which two reports have different ones, by their place, as `roc.true_positive_rate.3`."""
    if isinstance(recorded, dict) and isinstance(made, dict):
        for name in sorted(recorded.keys() | made.keys()):
            yield from differences(recorded.get(name), made.get(name), f"{place}.{name}" if place else name)
    elif isinstance(recorded, list) and isinstance(made, list) and len(recorded) == len(made):
        for number, (theirs, ours) in enumerate(zip(recorded, made, strict=True)):
            yield from differences(theirs, ours, f"{place}.{number}")
    elif recorded != made:
        yield f"{place}: recorded {_short(recorded)}, recomputed {_short(made)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def summary_of(folder: RunFolder) -> dict[str, Any]:
    """Content of summary.json; UserError where the run is not finished."""
    try:
        summary: dict[str, Any] = json.loads(folder.summary.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{folder.path}: there is no summary.json: the run is not finished") from None
    return summary


def _scored(predictor: Predictor, split: str) -> tuple[ScoredRows, np.ndarray[Any, Any]] | None:
    """Rank 0: the rows of a split and their numbers in the data."""
    found = predictor.scored_split(split)
    if found is None:
        none = np.zeros((0, len(predictor.class_names)))
        return ScoredRows(none, none, np.zeros(0, dtype=np.int64), np.zeros(0)), np.zeros(0, dtype=np.int64)
    predicted, rows = found
    if predicted is None:
        return None
    own, shipped = predicted.numpy(), predictor.shipped(predicted).numpy()
    return ScoredRows(own, shipped, rows.targets.cpu().numpy(), weights_of(rows)), rows.row_numbers.cpu().numpy()


_Tables = tuple[pl.DataFrame, pl.DataFrame | None]


def _tables(predictor: Predictor, config: JobConfig, report: ReportConfig) -> _Tables | None:
    """The features and the segments of all rows of the data; None where the task or the data have none."""
    task, inputs = predictor.members[0].task, predictor.input_columns
    if not isinstance(task, HasTable):
        if report.segments:
            raise UserError(f"report.segments: the task {config.task.name} has none: a report on it is of all rows")
        return None
    found = task.table(inputs, report)
    if found is None:
        return None
    table = typed(found, config.data.categorical)
    return table.select(inputs), table.select(report.segments) if report.segments else None


def _with_table(found: tuple[ScoredRows, np.ndarray[Any, Any]], tables: _Tables | None) -> ScoredRows:
    rows, numbers = found
    if tables is None:
        return rows
    features, segments = (None if table is None else table[numbers] for table in tables)
    return ScoredRows(rows.own, rows.shipped, rows.targets, rows.weights, features, segments)


def _positive(train: tuple[ScoredRows, np.ndarray[Any, Any]] | None, predictor: Predictor, report: ReportConfig) -> int:
    assert train is not None  # on rank 0
    return positive_class(report, predictor.class_names, train[0].targets)


def _card(
    config: JobConfig,
    summary: Mapping[str, Any],
    predictor: Predictor,
    rows: Mapping[str, ScoredRows],
) -> dict[str, Any]:
    run = f"{config.run.dir}/{config.run.name}"
    mode = f"exact, {config.train.virtual_ranks} virtual ranks" if config.train.virtual_ranks else "fast"
    return {
        "run": config.run.name,
        "purpose": f"probabilities of the classes of {config.data.target!r}",
        "model": config.model.name,
        "parameters": summary.get("parameters"),
        "weights": predictor.weights,
        "weights_sha256": summary["weights_sha256"],
        "calibration": predictor.calibration,
        "calibrated": predictor.calibrated,
        "data": config.data.path,
        "data_sha256": summary["data_sha256"],
        "split": _split(config),
        "row_weights": config.data.weight,
        "seed": config.run.seed,
        "mode": mode,
        "steps": summary["steps"],
        "optimizer": f"AdamW, learning rate {config.optim.lr:g}, weight decay {config.optim.weight_decay:g}",
        "world_size": summary["world_size"],
        "dist_train": summary.get("dist_train", __version__),
        "python": summary.get("python"),
        "machine": summary["machine"],
        "limits": _limits(config, rows),
        "verify": [f"dist-train verify {run}", f"dist-train report {run} --verify"],
    }


def _split(config: JobConfig) -> str:
    data = config.data
    if data.split_column:
        return f"by the column {data.split_column}"
    if Path(data.path).is_dir() and not is_store(data.path):
        drawn = f"where it has none of validation rows, {data.validation_fraction:g} at random"
        return f"by the files of {data.path}; {drawn}"
    by = f"by time ({data.time_column})" if data.time_column else "at random, by class"
    by += f", groups of {data.group_column} kept together" if data.group_column else ""
    by += f", {data.folds} folds" if data.folds else ""
    return f"{by}; valid {data.validation_fraction:g}, test {data.test_fraction:g}"


def _limits(config: JobConfig, rows: Mapping[str, ScoredRows]) -> list[str]:
    """What the numbers do not say, as far as it follows from the run."""
    limits = ["It holds for rows like those of the data: see the ranges of the columns below."]
    if not config.data.time_column:
        limits.append("The split is not by time: the numbers do not say how the model holds on later rows.")
    if not len(rows["test"].targets):
        limits.append("There are no test rows: the numbers are those of rows that training or its choices have seen.")
    if config.data.folds is not None and config.data.fold is None:
        limits.append("With folds the threshold and the bands are chosen on test rows, which flatters them a little.")
    smallest = np.bincount(rows["test"].targets).min() if len(rows["test"].targets) else 0
    if smallest < 100:
        limits.append(f"A class has {smallest} test rows: intervals are wide.")
    return limits


def curves_of(file: Path) -> dict[str, list[list[float]]]:
    """Step and loss of the lines of metrics.jsonl, thinned."""
    found: dict[str, list[list[float]]] = {"train": [], "valid": []}
    try:
        lines = file.read_text().splitlines()
    except OSError:  # an ensemble has none
        return found
    for line in lines:
        record = json.loads(line)
        if record.get("split") in found and record.get("loss") is not None:
            found[record["split"]].append([record["step"], record["loss"]])
    return {split: points[:: math.ceil(len(points) / POINTS_OF_A_CURVE) or 1] for split, points in found.items()}


def _plain(value: Any) -> Any:
    """JSON values: numpy's numbers as Python's, and numbers that are not finite as null."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
