"""Score a trained run on one of its splits, or on another table.

    dist-train evaluate runs/credit_risk
    dist-train evaluate runs/credit_risk --split valid --checkpoint last
    dist-train evaluate runs/credit_risk --data new_clients.parquet
    torchrun --standalone --nproc_per_node=8 -m dist_train evaluate runs/credit_risk        # same numbers, sooner

stderr gets a table for people; stdout gets one line of JSON, {"<split>": {...}}. The metrics are those of the model's
own probabilities; where it has a calibration, `calibrated` holds those of the calibrated ones. `drift` holds the
population stability index of columns that have moved from the training rows (docs/scoring.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dist_train.commands.parser import command_parser, path
from dist_train.errors import printable

if TYPE_CHECKING:
    from rich.table import Table


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", type=path, help="run folder, e.g. runs/credit_risk, or a trained model")
    parser.add_argument("--split", default="test", help="train, valid or test (default: test)")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: best)")
    parser.add_argument(
        "--data", type=path, help="CSV, JSON lines or Parquet file with the target column, instead of the run's own"
    )
    parser.add_argument("--drift", action="store_true", help="drift of every column, moved or not")
    arguments = parser.parse_args(argv)

    from dist_train.run.scoring.predictor import open_predictor
    from dist_train.system.console import print_json, terminal

    with open_predictor(arguments.run_dir, arguments.checkpoint, os.environ) as predictor:
        metrics = predictor.evaluate(arguments.split, arguments.data, all_drift=arguments.drift)
    if predictor.collectives.is_main:
        title = f"{arguments.run_dir}, {predictor.weights}, {arguments.data or arguments.split}"
        terminal().print(_table(metrics, title))
        print_json({arguments.split: metrics})


def _table(metrics: dict[str, Any], title: str) -> Table:
    from rich.table import Table

    table = Table(title=printable(title), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    after = metrics.get("calibrated", {})
    if after:
        table.add_column("calibrated", justify="right")
    for name, value in metrics.items():
        if not isinstance(value, (dict, list)):
            table.add_row(name, *(_text(scores.get(name)) for scores in (metrics, after) if scores))
    for name, scores in metrics.get("per_class", {}).items():
        row = f"precision {scores['precision']:.3f}  recall {scores['recall']:.3f}  f1 {scores['f1']:.3f}"
        table.add_row(f"class {printable(name)} ({scores['rows']:,} rows)", row)
    return table


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
