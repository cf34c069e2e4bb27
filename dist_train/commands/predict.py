"""Score the rows of a table with a trained run.

    dist-train predict runs/credit_risk clients.csv scores.csv
    dist-train predict runs/credit_risk clients.parquet scores.parquet --checkpoint last
    torchrun --standalone --nproc_per_node=2 -m dist_train predict runs/credit_risk clients.csv scores.csv

The input needs the feature columns that the run was trained on, in any order. Other columns, the target among them,
are ignored. A missing cell and an unknown category have codes of their own. The output has one row for each input row,
in the same order: probability_<class> for each class, and predicted_class.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import polars as pl

from dist_train.commands.parser import command_parser
from dist_train.errors import UserError

_WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".csv": pl.DataFrame.write_csv,
    ".parquet": pl.DataFrame.write_parquet,
}


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", type=Path, help="run folder, e.g. runs/credit_risk, or a trained model")
    parser.add_argument("input", type=Path, help="CSV or Parquet file")
    parser.add_argument("output", type=Path, help="CSV or Parquet file to write")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: best)")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if output.suffix.lower() not in _WRITERS:
        raise UserError(f"{output}: the name must end in .csv or .parquet")

    from dist_train.data.table import locate
    from dist_train.run.predictor import open_predictor
    from dist_train.system.console import log

    with open_predictor(arguments.run_dir, arguments.checkpoint, os.environ) as predictor:
        scores = predictor.table(locate(str(arguments.input)))
        predictor.collectives.on_rank_zero(lambda: _write(scores, output))
    if scores is not None:
        log.info("%d rows scored into %s", scores.height, output)


def _write(scores: pl.DataFrame | None, output: Path) -> None:
    assert scores is not None  # on rank 0
    aside = output.with_name(f".partial-{output.name}")
    try:
        _WRITERS[output.suffix.lower()](scores, aside)
        aside.replace(output)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from None
