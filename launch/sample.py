"""Write a small table, its configuration and the default configurations into a folder.

on any machine:
    python launch/sample.py demo
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("sample", "launch/sample.py", sys.argv[1:])
