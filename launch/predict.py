"""Score the rows of a table with a trained run.

    python launch/predict.py runs/credit_risk clients.csv scores.csv
    python launch/predict.py runs/credit_risk clients.parquet scores.parquet --checkpoint last

The input needs the feature columns that the run was trained on, in any order; others, the target among them, are
ignored. Missing cells and unknown categories are scored as the encoder learned to. The output has one row for each
input row, in the same order: probability_<class> for each class, and predicted_class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import polars as pl

from dist_train.data.table import locate
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import device_here, world_from_environment
from dist_train.errors import UserError
from dist_train.run.checkpoint.run_folder import opened_run
from dist_train.run.predictor import Predictor
from dist_train.system.console import log, run_command

_WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".csv": pl.DataFrame.write_csv,
    ".parquet": pl.DataFrame.write_parquet,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="launch/predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="run folder, e.g. runs/credit_risk")
    parser.add_argument("input", type=Path, help="CSV or Parquet file")
    parser.add_argument("output", type=Path, help="CSV or Parquet file to write")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: best)")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if output.suffix.lower() not in _WRITERS:
        raise UserError(f"{output}: the name must end in .csv or .parquet")
    runtime = opened_run(arguments.run_dir)[1].runtime
    # One process: an environment of a launcher has no say.
    world = world_from_environment({}, device=device_here(runtime.device))
    predictor = Predictor(arguments.run_dir, Collectives(world), arguments.checkpoint)
    scores = predictor.predict(locate(str(arguments.input)))
    _write(scores, output)
    log.info("%d rows scored into %s", scores.height, output)


def _write(scores: pl.DataFrame, output: Path) -> None:
    aside = output.with_name(f".partial-{output.name}")
    try:
        _WRITERS[output.suffix.lower()](scores, aside)
        aside.replace(output)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"{output}: cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    run_command(main)
