"""Train a run for each line of a file, and compare them; `--help` says more.

python launch/sweep.py sweep.txt configs/credit_risk.yaml --jobs 2
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("sweep", "launch/sweep.py", sys.argv[1:])
