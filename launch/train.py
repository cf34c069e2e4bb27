"""Train a classifier on a table.

8 GPUs of one machine:
    torchrun --standalone --nproc_per_node=8 launch/train.py configs/credit_risk.yaml optim.lr=3e-4

two ranks on a laptop's CPU:
    torchrun --standalone --nproc_per_node=2 launch/train.py configs/credit_risk.yaml

one process, for debugging (CPU or one GPU, seconds):
    python launch/train.py configs/credit_risk.yaml configs/debug.yaml

the plan, tried for some seconds: memory, rows per second, time to the end; leaves nothing:
    python launch/train.py configs/credit_risk.yaml --dry-run

Arguments that end in .yaml are merged from left to right, then key=value. Every key: README.md.
The same command continues a run that was interrupted. Exit code 0: done, or stopped and saved; 2: a mistake in what
was asked for; another: a fault.
"""

from __future__ import annotations

import argparse
import os

from dist_train.config.load import load_config
from dist_train.distributed.stopping import Launcher
from dist_train.distributed.world import world_from_environment
from dist_train.run.job import train
from dist_train.system.console import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="launch/train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="*", help="configuration files (.yaml) and key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, try it for some seconds, and leave nothing"
    )
    arguments = parser.parse_intermixed_args()  # --dry-run may stand anywhere
    launcher = Launcher() if "TORCHELASTIC_RUN_ID" in os.environ else None
    config = load_config(arguments.config)
    world = world_from_environment(os.environ, device=config.runtime.device, backend=config.runtime.backend)
    train(config, world, os.environ, launcher=launcher, dry_run=arguments.dry_run)


if __name__ == "__main__":
    run_command(main)
