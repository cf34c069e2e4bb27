"""Train a classifier on a table; `--help` says more.

8 GPUs of one machine:
    torchrun --standalone --nproc_per_node=8 launch/train.py configs/credit_risk.yaml optim.lr=3e-4

one process on a laptop, for debugging (CPU or one GPU, seconds):
    python launch/train.py configs/credit_risk.yaml configs/debug.yaml
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("train", "launch/train.py", sys.argv[1:])
