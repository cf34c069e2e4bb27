"""Answer HTTP requests with the probabilities of a trained classifier; `--help` says more.

the model of a table, and one of texts by vLLM:
    python launch/serve.py runs/credit_risk
    python launch/serve.py runs/news_sentiment --engine vllm
"""

import sys

from dist_train.__main__ import run

if __name__ == "__main__":
    run("serve", "launch/serve.py", sys.argv[1:])
