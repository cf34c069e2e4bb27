"""Train a classifier on a table.

8 GPUs of one machine:
    torchrun --standalone --nproc_per_node=8 -m dist_train train configs/credit_risk.yaml optim.lr=3e-4

two ranks on a laptop's CPU:
    torchrun --standalone --nproc_per_node=2 -m dist_train train configs/credit_risk.yaml

one process, for debugging (CPU or one GPU, seconds):
    dist-train train configs/credit_risk.yaml configs/debug.yaml

the plan and a dry run of some seconds: memory, rows per second, time to the end; nothing is written:
    dist-train train configs/credit_risk.yaml --dry-run

Arguments that end in .yaml are merged from left to right, then key=value. Every key: docs/configuration.md.
Without arguments, the built-in table is trained with the defaults.
The same command continues a run that was interrupted. Exit code 0: done, or stopped and saved; 2: a mistake in the
arguments or the data; another: a fault.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dist_train.commands.parser import command_parser
from dist_train.config.load import load_config


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("config", nargs="*", help="configuration files (.yaml) and key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, try it for some seconds, and write nothing"
    )
    arguments = parser.parse_intermixed_args(argv)  # --dry-run may stand anywhere
    config = load_config(arguments.config)

    # torch takes seconds to import: a mistake in the configuration is told before.
    from dist_train.distributed.stopping import Launcher
    from dist_train.distributed.world import world_from_environment
    from dist_train.run.job import train

    launcher = Launcher() if "TORCHELASTIC_RUN_ID" in os.environ else None
    runtime = config.runtime
    world = world_from_environment(
        os.environ, device=runtime.device, backend=runtime.backend, timeout_seconds=runtime.timeout_seconds
    )
    train(config, world, os.environ, launcher=launcher, dry_run=arguments.dry_run)
