"""Turn the files of a large table into a store that training maps to memory.

    dist-train prepare 'loans/*.parquet' stores/loans configs/loans.yaml
    torchrun --standalone --nproc_per_node=8 -m dist_train prepare 'loans/2024-*.csv' 'loans/2025-*.csv' stores/loans \\
        configs/loans.yaml data.max_categories=64
    dist-train prepare stores/loans --verify                # reads every block and compares its SHA-256

Then train with data.path=stores/loans. The table has the rows of all files in the order of the arguments; the files of
a pattern are sorted by name. The configuration names the target, the features and the splits. The store is the same
for any number of ranks.
The same command continues an interrupted one. Exit code 0: done, or stopped; 2: a mistake in the arguments or the data,
or a damaged store; another: a fault.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dist_train.commands.parser import command_parser, path
from dist_train.config.load import is_setting, load_config
from dist_train.errors import UserError


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="INPUT... OUTPUT_DIR [config]",
        help="files (CSV, JSON lines, Parquet) or patterns; the folder to make; configuration files (.yaml), key=value",
    )
    parser.add_argument("--verify", action="store_true", help="check every block of the store that is there")
    arguments = parser.parse_intermixed_args(argv)
    of_configuration = [a for a in arguments.arguments if a.endswith((".yaml", ".yml")) or is_setting(a)]
    paths = [str(path(a)) for a in arguments.arguments if a not in of_configuration]
    config = load_config(of_configuration)

    from dist_train.distributed.stopping import Launcher
    from dist_train.distributed.world import world_from_environment
    from dist_train.run.preparation import prepare, verify_store
    from dist_train.system.console import log

    world = world_from_environment(os.environ, device="cpu", backend="gloo")
    if arguments.verify:
        if len(paths) != 1:
            raise UserError("--verify: name one store")
        store = verify_store(Path(paths[0]), world, config.runtime.timeout_seconds)
        log.info("%s: every block is sound; data sha256 %s", store.folder, store.sha256)
        return
    if len(paths) < 2 or not Path(paths[-1]).name:
        raise UserError("name the files of the table, and after them the folder to make")
    launcher = Launcher() if "TORCHELASTIC_RUN_ID" in os.environ else None
    prepare(paths[:-1], Path(paths[-1]), config, world, os.environ, launcher=launcher)
