"""Score the rows of a table with a trained run.

    dist-train predict runs/credit_risk clients.csv scores.csv
    dist-train predict runs/credit_risk clients.parquet scores.parquet --checkpoint last
    dist-train predict runs/credit_risk clients.csv scores.csv --keep client_id
    dist-train predict runs/credit_risk clients.csv scores.csv --reasons 4
    torchrun --standalone --nproc_per_node=2 -m dist_train predict runs/credit_risk clients.csv scores.csv

The input needs the feature columns that the run was trained on, in any order. Other columns, the target among them,
are ignored. A missing cell and an unknown category have codes of their own. The output has one row for each input row,
in the same order: the columns that --keep names as they stand in the input, probability_<class> for each class, and
predicted_class. An output that is a link stays one: the file behind it is written. The input and the run's own data are
never overwritten. Probabilities are calibrated where the trained model has a calibration (docs/risk.md).

--reasons N names for each row the N columns that raise the log-odds of the positive class most, and by how much
(docs/scoring.md). stdout gets one line of JSON that says which class that is, and whether its log-odds are calibrated.

Files of any size are scored in bounded memory. Every number of ranks writes the same bytes. The output appears when it
is whole; until then its rows lie beside it, in .partial- files. The same command continues them after the process was
killed, where input and model are unchanged.

The input may be a store of `dist-train prepare`, of the same columns as the model's: the output then has `row`, the
number of the row in the table that was prepared, and its scores. A store holds no cells: nothing can be kept, explained
or looked at for drift, and the probabilities of all its rows are held in memory.

With --url a server computes (texts, `serve --engine vllm`): it must have the trained model of the run. Tokens,
calibration and output are those of this process; probabilities agree to about 1e-6 with what it computes itself.

stderr names the columns of which many cells are unlike those of training (categories that the model does not know,
numbers outside of the range, missing cells where none were), and categories in another spelling, as MALE for male.
Where there are such, stdout gets one line of JSON with the rows and, by column, the shares of such cells:
{"rows": ..., "unknown_categories": {...}, "spelled_otherwise": {...}, "outside_training_range": {...},
"missing_unlike_training": {...}, "drift": {...}}. --refuse-unfamiliar refuses such a file instead: exit code 2, no
output. `drift` has the population stability index of the columns that have moved from the training rows as a whole;
they are named on stderr and not refused. With --drift it has that of every column.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_train.commands.parser import command_parser, path
from dist_train.errors import UserError

if TYPE_CHECKING:
    from dist_train.run.scoring.predictor import Predictor

_KINDS = (".csv", ".parquet")


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", type=path, help="run folder, e.g. runs/credit_risk, or a trained model")
    parser.add_argument("input", type=path, help="CSV, JSON lines or Parquet file, or a store")
    parser.add_argument("output", type=path, help="CSV or Parquet file to write")
    parser.add_argument("--checkpoint", default="best", help="best, last or a step (default: best)")
    parser.add_argument("--uncalibrated", action="store_true", help="the model's own probabilities")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="COLUMN", help="a column of the input to carry over; repeatable"
    )
    parser.add_argument(
        "--refuse-unfamiliar", action="store_true", help="write nothing where a column would be named on stderr"
    )
    parser.add_argument("--drift", action="store_true", help="print the drift of every column, moved or not")
    parser.add_argument("--reasons", type=int, default=0, metavar="N", help="so many reasons for each row")
    parser.add_argument(
        "--reasons-for", metavar="CLASS", help="class that they are for (default: the positive class of the run)"
    )
    parser.add_argument("--url", help="a server of `serve --engine vllm`, which computes in the place of this process")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if arguments.reasons < 0 or (arguments.reasons_for and not arguments.reasons):
        raise UserError("--reasons: must be a number of columns, 1 or more")
    if arguments.url and (arguments.reasons or arguments.checkpoint != "best"):
        raise UserError("--url: the server has the trained model alone: no --checkpoint and no --reasons beside it")
    if output.suffix.lower() not in _KINDS:
        raise UserError(f"{output}: the name must end in .csv or .parquet")

    from dist_train.data.stores.store import is_store
    from dist_train.data.tables.table import locate
    from dist_train.run.scoring.predictor import open_predictor
    from dist_train.run.scoring.score_file import score_file
    from dist_train.system.console import log

    from_store = is_store(arguments.input)
    for option in ("keep", "reasons", "refuse_unfamiliar", "drift", "url"):
        if from_store and getattr(arguments, option):
            raise UserError(f"--{option.replace('_', '-')}: {arguments.input} is a store, which holds no cells")
    calibrated = False if arguments.uncalibrated else None
    with open_predictor(arguments.run_dir, arguments.checkpoint, os.environ, calibrated=calibrated) as predictor:
        if from_store:
            from dist_train.run.scoring.score_store import score_store

            rows = score_store(predictor, arguments.input, output)
            if rows is not None:
                log.info("%d rows scored into %s", rows, output)
            return
        if arguments.url:
            _compute_at(arguments.url, arguments.run_dir, predictor)
        reasons, wanted = arguments.reasons, arguments.reasons_for
        source, refuse = locate(str(arguments.input)), arguments.refuse_unfamiliar
        found = score_file(predictor, source, output, arguments.keep, reasons, wanted, refuse_unfamiliar=refuse)
        explained = predictor.explainer(wanted).described() if reasons else {}
    if found is not None:
        rows, unfamiliar = found
        log.info("%d rows scored into %s", rows, output)
        if shares := unfamiliar.as_json(all_drift=arguments.drift) | explained:
            print(json.dumps({"rows": rows, **shares}, ensure_ascii=False), flush=True)


def _compute_at(url: str, run_dir: Path, predictor: Predictor) -> None:
    from dist_train.serving.vllm_client import remote_model
    from dist_train.serving.vllm_server import served_model

    name = predictor.collectives.on_rank_zero(lambda: served_model(run_dir).name)
    predictor.compute_with(remote_model(url, name, predictor.members[0].task), f"{url} {name}")
