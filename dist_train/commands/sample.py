"""Write a small table, its configuration and the default configurations into a folder.

    dist-train sample demo

loans.csv              6,000 rows of the built-in table of credit-card clients
loans.yaml             a configuration that trains on loans.csv
clients.csv            100 other rows, without the target, to be scored by `predict`
configs/*.yaml         credit_risk.yaml, the default job on the whole built-in table; debug.yaml, for short runs;
                       any_table.yaml, for a table of your own; news_sentiment.yaml, for texts; and others

The paths in loans.yaml are relative to the folder: run the commands there. A file that exists is not overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from dist_train.commands.parser import as_called, command_parser, path
from dist_train.errors import UserError, printable

PACKAGE = Path(__file__).parent.parent
TABLE = PACKAGE / "data" / "datasets" / "credit_card_risk.parquet"
SAMPLES = PACKAGE / "samples"
TARGET = "risk_tier"
LABELLED_ROWS, UNLABELLED_ROWS = 6000, 100


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("folder", type=path, metavar="DIR", help="folder to write into; made if it does not exist")
    folder: Path = parser.parse_args(argv).folder
    contents = sample_files()
    present = [name for name in contents if (folder / name).exists()]
    if present:
        raise UserError(f"{folder / present[0]} exists: name another folder")
    try:
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    print(printable(f"{folder}: {', '.join(contents)}"))
    if not program.startswith("launch/"):  # those are run in the checkout, and not in the sample's folder
        print(printable(as_called(program, f"next: cd {folder}; dist-train train loans.yaml")))


def sample_files() -> dict[str, str]:
    """The content of each file, by its name in the folder."""
    rows = pl.read_parquet(TABLE, n_rows=LABELLED_ROWS + UNLABELLED_ROWS).drop("split")
    rows = rows.with_row_index("client_id", offset=1)
    labelled, unlabelled = rows.head(LABELLED_ROWS), rows.tail(UNLABELLED_ROWS).drop(TARGET)
    return {
        "loans.csv": labelled.write_csv(),
        "loans.yaml": (SAMPLES / "loans.yaml").read_text(),
        "clients.csv": unlabelled.write_csv(),
        **{f"configs/{file.name}": file.read_text() for file in sorted((SAMPLES / "configs").glob("*.yaml"))},
    }
