"""For all tests."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# As torchrun gives its ranks: a sum over two threads rounds in another order, and threads of several tests fight.
torch.set_num_threads(1)

# nohup leaves it ignored for every program that is started below it, and tests send it to those that they start.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests in each of these share what takes long to set up.
SHARING = ("tests/slurm/", "tests/hosts/", "tests/cli/test_train.py", "tests/cli/test_verify.py")


class Scheduling(LoadScopeScheduling):
    """Each test goes to whichever pytest worker is free; those of an entry of SHARING go to one together, and first."""

    def _split_scope(self, nodeid: str) -> str:
        return next((part for part in SHARING if nodeid.startswith(part)), nodeid)


# What a reason to skip has in it, and how to have the test run.
HOW_TO_RUN = (
    ("transformers", "pip install -e '.[text]'"),
    ("GPU", "run `make test` on a machine with a CUDA device"),
    ("is not installed", "run `make bench` once, which installs it"),
    ("wandb", "install wandb"),
    ("needs ", "run `bash .ci/run` as root on Linux, which installs it"),
)


def skipped_tests(reasons: Sequence[str]) -> list[str]:
    """One line for each reason: how many tests were skipped for it, and how to have them run."""
    lines = []
    for reason, count in sorted(Counter(reasons).items()):
        how = next((text for part, text in HOW_TO_RUN if part in reason), "")
        lines.append(f"{count} skipped: {reason}{f': {how}' if how else ''}")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say at the end what was skipped, and how to have it run."""
    skipped = terminalreporter.stats.get("skipped", [])
    lines = skipped_tests([str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped])
    if "not slow" in config.option.markexpr:
        lines.append("left out: tests marked slow: run `make soak`")
    if lines:
        terminalreporter.section("not run here")
        for line in lines:
            terminalreporter.write_line(line)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Any:
    # Not xdist's own groups: pytest-xdist 3.8 forgets them under pytest 9.2.
    return Scheduling(config, log)
