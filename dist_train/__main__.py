"""The program: `dist-train VERB ...`, which is the same as `python -m dist_train VERB ...`.

`torchrun ... -m dist_train VERB ...` runs it on several ranks. `launch/VERB.py` is the same code in a checkout.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import NoReturn

from dist_train import __version__

VERBS = {
    "train": "train a classifier on a table; the same command continues an interrupted run",
    "predict": "score the rows of a table",
    "export": "write a trained run as ONNX, for programs without torch",
    "serve": "answer HTTP requests with the probabilities of a trained classifier",
    "evaluate": "metrics of a trained run on one of its splits, or on another table",
    "report": "report on a trained run: report.html, report.json and figures",
    "compare": "compare finished runs: configurations, metrics, curves, differences with intervals",
    "sweep": "train a run for each line of a file, and compare them",
    "verify": "replay a run and compare every bit",
    "sign": "sign a trained model with a private key",
    "prepare": "turn a table that is larger than memory into a store",
    "submit": "write, check and submit a Slurm job",
    "sample": "write a small table, its configuration and the default configurations into a folder",
}


def main() -> None:
    """Run the verb that the command line names; without one, list the verbs."""
    verb, arguments = sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:]
    program = "python -m dist_train" if sys.argv[0].endswith("__main__.py") else "dist-train"
    if verb in ("-h", "--help"):
        print(_usage(program))
    elif verb == "--version":
        print(f"dist-train {__version__}")
    else:
        run(verb, f"{program} {verb}", arguments)


def run(verb: str, program: str, arguments: Sequence[str]) -> NoReturn:
    """Run a verb to its exit code; `program` is its name in messages. Does not return."""
    from dist_train.system.console import run_command

    run_command(partial(_call, verb, program, arguments))


def _call(verb: str, program: str, arguments: Sequence[str]) -> None:
    from dist_train.errors import UserError

    if verb not in VERBS:
        close = get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the verbs are {', '.join(VERBS)}"
        raise UserError(f"there is no verb {verb!r}: {hint}")
    import_module(f"dist_train.commands.{verb}").main(program, arguments)


def _usage(program: str) -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            f"usage: {program} VERB [arguments]",
            "",
            "Trains classifiers for financial risk on tables.",
            "",
            *(f"  {verb:{width}}  {text}" for verb, text in VERBS.items()),
            "",
            f"{program} VERB --help explains a verb. On several ranks:",
            "torchrun --standalone --nproc_per_node=8 -m dist_train VERB [arguments]",
        ]
    )


if __name__ == "__main__":
    main()
