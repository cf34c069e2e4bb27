"""Compare finished runs: configurations side by side, metrics, curves, and paired differences with intervals.

    dist-train compare runs/credit_risk runs/credit_risk-lr=0.001
    dist-train compare runs/credit_risk-* --html comparison.html

Keys that differ come first. Differences of log loss and accuracy are those of a run less the first one, on the same
test rows, with bootstrap intervals at 95 %; the probabilities are those that the models ship, calibrated or not. The
data are read from the path in each run's configuration, relative to the current folder; where they are not there, or
the test rows are others, it is said and the rest is compared. The page of --html needs no network; the extra `report`
makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_train.commands.parser import command_parser, path
from dist_train.errors import UserError


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", nargs="+", type=path, help="run folders; the first is the one compared with")
    parser.add_argument("--html", type=path, metavar="FILE", help="write a page as well")
    arguments = parser.parse_args(argv)
    if len(arguments.run_dir) < 2:
        raise UserError(f"{arguments.run_dir[0]}: a comparison needs two runs or more")
    show_comparison(arguments.run_dir, arguments.html)


def show_comparison(folders: Sequence[Path], page: Path | None) -> None:
    """Print the comparison of runs, and write its page. Raises UserError."""
    from dist_train.risk.comparison_page import comparison_page, text_of
    from dist_train.risk.figures import require_matplotlib
    from dist_train.run.comparison import comparison_of
    from dist_train.system.console import log
    from dist_train.system.files import write_atomically

    if page is not None:
        require_matplotlib()
    content = comparison_of(folders)
    print(text_of(content), end="", flush=True)
    if page is not None:
        try:
            write_atomically(page, comparison_page(content).encode())
        except OSError as error:
            raise UserError(f"{page}: cannot be written: {error.strerror or error}") from None
        log.info("comparison in %s", page)
