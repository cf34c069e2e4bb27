"""Train a run for each line of a file on this machine, and compare them.

    dist-train sweep sweep.txt configs/credit_risk.yaml
    dist-train sweep sweep.txt configs/credit_risk.yaml train.epochs=5 --jobs 4 --html comparison.html

A line holds key=value, as on a command line: optim.lr=0.01 model.dropout=0.2. Its run is named by these values, as
credit_risk-lr=0.01-dropout=0.2. The same file is trained by an array of Slurm (dist-train submit --sweep).

The same command continues what was interrupted, and leaves finished runs alone. --jobs trains so many at a time; they
share the cores, and each writes what it says beside its run folder, to <name>.log. The comparison comes last; its first
run is that of the lowest validation loss. The exit code is 1 if a run is not finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from dist_train.commands.compare import show_comparison
from dist_train.commands.parser import command_parser, path
from dist_train.config.sweep import runs_of_sweep
from dist_train.errors import TrainingFault, UserError


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("sweep", type=path, metavar="FILE.txt", help="one run for each line of key=value in the file")
    parser.add_argument("config", nargs="*", help="configuration files (.yaml) and key=value")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--html", type=path, metavar="FILE", help="write the comparison as a page as well")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: must be 1 or more")
    lines = runs_of_sweep(arguments.sweep, arguments.config)

    from dist_train.run.checkpoint.run_folder import RunFolder
    from dist_train.run.sweep import SweepRun, train_all

    if arguments.html is not None:
        from dist_train.risk.figures import require_matplotlib

        require_matplotlib()
    runs = [SweepRun(config, given) for config, given in lines]
    unfinished = train_all(runs, arguments.jobs, os.environ)
    finished = [run.folder for run in runs if run.config.run.name not in unfinished]
    losses = {}
    for folder in finished:
        summary = json.loads(RunFolder(folder).summary.read_bytes())
        losses[folder] = (summary["valid"] or {}).get("loss", float("inf"))
    finished.sort(key=lambda folder: losses[folder])
    if len(finished) > 1:
        show_comparison(finished, arguments.html)
    if unfinished:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unfinished.items())
        raise TrainingFault(f"{len(unfinished)} of {len(runs)} runs are not finished: {reasons}")
