"""Write the report on a finished run; `--help` says more.

4 GPUs of one machine, and one process on a laptop:
    torchrun --standalone --nproc_per_node=4 launch/report.py runs/credit_risk
    python launch/report.py runs/credit_risk
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("report", "launch/report.py", sys.argv[1:])
