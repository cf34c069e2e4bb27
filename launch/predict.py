"""Score the rows of a table with a trained run; `--help` says more.

one process, on a GPU or a laptop's CPU:
    python launch/predict.py runs/credit_risk clients.csv scores.csv
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("predict", "launch/predict.py", sys.argv[1:])
