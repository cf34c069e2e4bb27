"""Sign a trained model with a private key; `--help` says more.

python launch/sign.py runs/credit_risk --key private.pem
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("sign", "launch/sign.py", sys.argv[1:])
