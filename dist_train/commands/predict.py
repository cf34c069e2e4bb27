"""Score the rows of a table with a trained run.

    dist-train predict runs/credit_risk clients.csv scores.csv
    dist-train predict runs/credit_risk clients.parquet scores.parquet --checkpoint last
    torchrun --standalone --nproc_per_node=2 -m dist_train predict runs/credit_risk clients.csv scores.csv

The input needs the feature columns that the run was trained on, in any order. Other columns, the target among them,
are ignored. A missing cell and an unknown category have codes of their own. The output has one row for each input row,
in the same order: probability_<class> for each class, and predicted_class. An output that is a link stays one: the file
behind it is written. The input and the run's own data are never overwritten. Probabilities are calibrated where the
trained model has a calibration (docs/risk.md).

stderr names the columns of which many cells are unknown categories, or missing although none was in training. Where
there are such, stdout gets one line of JSON with the rows and, by column, the shares of such cells:
{"rows": ..., "unknown_categories": {...}, "missing_unlike_training": {...}}.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import polars as pl

from dist_train.commands.parser import command_parser, path
from dist_train.errors import UserError
from dist_train.system.files import TMP_PREFIX

_WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".csv": pl.DataFrame.write_csv,
    ".parquet": pl.DataFrame.write_parquet,
}


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", type=path, help="run folder, e.g. runs/credit_risk, or a trained model")
    parser.add_argument("input", type=path, help="CSV or Parquet file")
    parser.add_argument("output", type=path, help="CSV or Parquet file to write")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: best)")
    parser.add_argument("--uncalibrated", action="store_true", help="the model's own probabilities")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if output.suffix.lower() not in _WRITERS:
        raise UserError(f"{output}: the name must end in .csv or .parquet")

    from dist_train.data.table import locate
    from dist_train.run.predictor import open_predictor
    from dist_train.system.console import log

    calibrated = False if arguments.uncalibrated else None
    with open_predictor(arguments.run_dir, arguments.checkpoint, os.environ, calibrated=calibrated) as predictor:
        source = locate(str(arguments.input))
        kept = {"the input": source, "the data of the run": Path(predictor.config.data.path)}
        predictor.collectives.on_rank_zero(lambda: _require_writable(output, kept))
        found = predictor.table(source)
        scores = found and found[0]
        predictor.collectives.on_rank_zero(lambda: _write(scores, output))
    if found is not None:
        scored, unfamiliar = found
        log.info("%d rows scored into %s", scored.height, output)
        if shares := unfamiliar.as_json():
            print(json.dumps({"rows": scored.height, **shares}, ensure_ascii=False), flush=True)


def _require_writable(output: Path, kept: Mapping[str, Path]) -> None:
    """Refuse, before anything is computed, an output that cannot be written or must not be: one of `kept`.

    Raises:
        UserError: says why.
    """
    target = _behind_links(output)
    for what, file in kept.items():
        with suppress(OSError):
            inside = file.is_dir() and file.resolve() in target.parents
            if inside or (target.exists() and target.samefile(file)):
                raise UserError(f"{output}: is {what} ({file}), which is not overwritten: name another file")
    try:
        mode = target.stat().st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unwritable(output, error) from None
    try:
        aside = _aside(target)
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise _unwritable(output, error) from None


def _write(scores: pl.DataFrame | None, output: Path) -> None:
    assert scores is not None  # on rank 0
    target = _behind_links(output)
    aside = _aside(target)
    try:
        _WRITERS[output.suffix.lower()](scores, aside)
        with suppress(FileNotFoundError):
            shutil.copymode(target, aside)
        aside.replace(target)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise _unwritable(output, error) from None


def _behind_links(output: Path) -> Path:
    """The file that is meant, which need not exist. Raises UserError for a link that leads to itself."""
    try:
        return output.resolve(strict=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{output}: cannot be written: the link leads to itself ({error})") from None


def _aside(target: Path) -> Path:
    return target.with_name(f"{TMP_PREFIX}{os.getpid()}{target.suffix}")


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"{output}: cannot be written: {error.strerror or error}")
