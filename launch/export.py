"""Export a trained run to ONNX or to an archive of torch.export; `--help` says more.

one process:
    python launch/export.py runs/credit_risk credit_risk.onnx
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("export", "launch/export.py", sys.argv[1:])
