"""Write a Slurm job for a training run, show it, and submit it; `--help` says more.

8 GPUs on each of two nodes; then the script of the same job, to read:
    python launch/submit.py --nodes=2 --gpus-per-node=8 --time=4:00:00 configs/credit_risk.yaml optim.lr=3e-4
    python launch/submit.py --nodes=2 --gpus-per-node=8 --print configs/credit_risk.yaml
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("submit", "launch/submit.py", sys.argv[1:])
