"""Replay a run from its checkpoints and compare every bit; `--help` says more.

4 GPUs of one machine, and one process on a laptop:
    torchrun --standalone --nproc_per_node=4 launch/verify.py runs/credit_risk
    python launch/verify.py runs/credit_risk
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("verify", "launch/verify.py", sys.argv[1:])
