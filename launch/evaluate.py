"""Score a trained run on one of its splits, or on another table; `--help` says more.

8 GPUs of one machine, and one process on a laptop; both give the same numbers:
    torchrun --standalone --nproc_per_node=8 launch/evaluate.py runs/credit_risk
    python launch/evaluate.py runs/credit_risk
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("evaluate", "launch/evaluate.py", sys.argv[1:])
