"""Write a Slurm job for a training run, show it, and submit it.

8 GPUs on each of two nodes, requeued until training is over:
    dist-train submit --nodes=2 --gpus-per-node=8 --time=4:00:00 configs/credit_risk.yaml optim.lr=3e-4

the script, to read and to submit by hand:
    dist-train submit --nodes=2 --gpus-per-node=8 --print configs/credit_risk.yaml

four seeds, or a run for each line of a file with key=value in it; each has a run folder of its own:
    dist-train submit --seeds=0-3 configs/credit_risk.yaml
    dist-train submit --sweep=sweep.txt configs/credit_risk.yaml

other options of a cluster:
    dist-train submit --partition=gpu --account=risk --line='module load cuda' configs/credit_risk.yaml
    dist-train submit --sbatch=--reservation=friday --sbatch=--signal=B:USR1@600 configs/credit_risk.yaml

Run it in the repository root. The job uses the environment that runs this command, and slurm/train.sbatch does the
work. This command checks the configuration, and `sbatch --test-only` checks the job, before anything is queued. stdout
gets the job's number. Exit code 0: submitted; 2: a mistake in the arguments, or a job that sbatch refuses.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_train.commands.parser import command_parser, path
from dist_train.config.load import load_config
from dist_train.config.run_path import path_of_run
from dist_train.config.sweep import sweep_lines
from dist_train.errors import UserError

# Options that are sbatch's own, under its own names: (name, meaning).
SBATCH_OPTIONS = (
    ("nodes", "number of nodes (default: 1)"),
    ("gpus-per-node", "GPUs of a node, and so its ranks (default: none)"),
    ("cpus-per-task", "CPU cores of a node; its ranks share them"),
    ("mem", "memory of a node, e.g. 64G"),
    ("time", "time limit of one start; the job requeues itself and continues"),
    ("partition", "partition of the job"),
    ("account", "account that is charged"),
    ("qos", "quality of service"),
    ("constraint", "features that the nodes must have"),
    ("dependency", "e.g. afterok:123"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The parts of a job script. `script` is sourced; `options` replace those of its own #SBATCH lines."""

    script: Path
    options: Sequence[str]
    lines: Sequence[str]
    environment: Path
    ranks_per_node: int | None
    arguments: Sequence[str]

    def text(self, root: Path) -> str:
        """The whole script, to be run in the repository `root`."""
        lines = (root / self.script).read_text().splitlines()
        defaults = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
        replaced = {option.partition("=")[0] for option in self.options}
        kept = [option for option in defaults if option.partition("=")[0] not in replaced]
        exports = {"DIST_TRAIN_VENV": str(self.environment)}
        if self.ranks_per_node is not None:
            exports["NPROC_PER_NODE"] = str(self.ranks_per_node)
        return "\n".join(
            [
                "#!/usr/bin/env bash",
                *(f"#SBATCH {_for_sbatch(option)}" for option in (*self.options, *kept, f"--chdir={root}")),
                "",
                *self.lines,
                *(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
                f". {self.script} {shlex.join(self.arguments)}".rstrip(),
                "",
            ]
        )


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    arguments = _parser(program).parse_intermixed_args(argv)
    root = Path.cwd()
    if not (root / "slurm/train.sbatch").is_file():
        raise UserError(f"{root} is not the repository root: run the command there")
    job = _job(arguments)
    script = job.text(root)
    if arguments.print:
        print(script, end="", flush=True)
        return
    _sbatch(script, "--test-only")
    number = _sbatch(script, "--parsable").partition(";")[0]
    each = "-*" if arguments.seeds or arguments.sweep else ""
    print(f"job {number} trains {path_of_run(load_config(arguments.config))}{each}", file=sys.stderr)
    print(number, flush=True)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = command_parser(program, __doc__)
    parser.add_argument("config", nargs="*", help="configuration files (.yaml) and key=value")
    parser.add_argument("--print", action="store_true", help="print the script and stop")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks of a node (default: its GPUs, else 1)")
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--seeds", metavar="0-3", help="one run for each seed")
    many.add_argument("--sweep", type=path, metavar="FILE.txt", help="one run for each line of key=value in the file")
    parser.add_argument("--line", action="append", default=[], help="a line of shell before training; may be repeated")
    parser.add_argument("--sbatch", action="append", default=[], help="another option of sbatch; may be repeated")
    group = parser.add_argument_group("options of sbatch")
    for name, meaning in SBATCH_OPTIONS:
        group.add_argument(f"--{name}", help=meaning)
    return parser


def _job(arguments: argparse.Namespace) -> Job:
    """The job of these arguments.

    Raises:
        UserError: One of its configurations cannot be trained.
    """
    if arguments.ranks is not None and arguments.ranks < 1:
        raise UserError(f"--ranks={arguments.ranks}: a node needs 1 or more")
    config: list[str] = arguments.config
    name = load_config(config).run.name
    array: list[str] = []
    if arguments.sweep:
        array = [f"--array=1-{len(sweep_lines(arguments.sweep, config))}"]
        config = [str(arguments.sweep), *config]
    elif arguments.seeds:
        array = [f"--array={arguments.seeds}"]
    given = {name: getattr(arguments, name.replace("-", "_")) for name, _ in SBATCH_OPTIONS}
    return Job(
        script=Path("slurm/array.sbatch" if array else "slurm/train.sbatch"),
        options=[
            f"--job-name={name}",
            *array,
            *(f"--{option}={value}" for option, value in given.items() if value is not None),
            *arguments.sbatch,
        ],
        lines=arguments.line,
        environment=Path(sys.prefix),
        ranks_per_node=arguments.ranks,
        arguments=config,
    )


def _for_sbatch(option: str) -> str:
    """The option for a #SBATCH line; a value with blanks or quotes is put in double quotes."""
    name, equals, value = option.partition("=")
    if "\n" in option or not name.startswith("-"):
        raise UserError(f"{option!r} is not an option of sbatch: --NAME=VALUE, in one line")
    if not re.search(r"[\s\"'\\\\#]", value):
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'


def _sbatch(script: str, option: str) -> str:
    """The last line of sbatch's answer.

    Raises:
        UserError: There is no sbatch, or it refuses the job.
    """
    program = shutil.which("sbatch")
    if program is None:
        raise UserError("sbatch is not on this machine: submit from the cluster's login node, or see --print")
    done = subprocess.run([program, option], input=script, capture_output=True, text=True, check=False)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode != 0:
        raise UserError(f"sbatch refuses the job: {'; '.join(said) or f'exit code {done.returncode}'}")
    return said[-1] if said else ""
