"""Turn the files of a large table into a store that training maps to memory; `--help` says more.

8 processes of one machine, and one process on a laptop; both make the same store:
    torchrun --standalone --nproc_per_node=8 launch/prepare.py 'loans/*.parquet' stores/loans configs/loans.yaml
    python launch/prepare.py 'loans/*.parquet' stores/loans configs/loans.yaml
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("prepare", "launch/prepare.py", sys.argv[1:])
