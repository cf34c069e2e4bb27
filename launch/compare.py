"""Compare finished runs; `--help` says more.

python launch/compare.py runs/credit_risk runs/credit_risk-seed1
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("compare", "launch/compare.py", sys.argv[1:])
