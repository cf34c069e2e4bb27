"""Check a configuration and print its run folder, for job scripts, without importing torch.

python -m dist_train.config.run_path configs/credit_risk.yaml optim.lr=3e-4      # runs/credit_risk

A mistake is reported as `dist-train train` reports it: one line on stderr, exit code 2, nothing on stdout.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dist_train.config.load import load_config
from dist_train.config.schema import JobConfig
from dist_train.errors import EXIT_USER_ERROR, UserError


def path_of_run(config: JobConfig) -> Path:
    """The run folder of this configuration. `run/checkpoint/run_folder.py` knows its layout."""
    return Path(config.run.dir) / config.run.name


def main(arguments: Sequence[str]) -> int:
    """Print the run folder; the exit code."""
    try:
        print(path_of_run(load_config(arguments)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
