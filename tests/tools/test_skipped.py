"""The end of `make test`: what was skipped and how to have it run."""

from __future__ import annotations

from tests.conftest import skipped_tests


def test_each_reason_has_a_line_with_its_count_and_a_way_to_run_it() -> None:
    reasons = ["torch.cuda sees no GPU on this machine", "needs sbatch, root", "torch.cuda sees no GPU on this machine"]
    assert skipped_tests([*reasons, "no reason of ours"]) == [
        "1 skipped: needs sbatch, root: run `bash .ci/run` as root on Linux, which installs it",
        "1 skipped: no reason of ours",
        "2 skipped: torch.cuda sees no GPU on this machine: run `make test` on a machine with a CUDA device",
    ]
