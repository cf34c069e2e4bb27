"""Serve a trained classifier over HTTP; `--help` says more.

a text classifier on loopback, by vLLM:
    python launch/serve.py runs/news_sentiment --engine vllm
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("serve", "launch/serve.py", sys.argv[1:])
