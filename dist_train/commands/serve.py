"""Serve a trained classifier over HTTP.

    dist-train serve runs/news_sentiment --engine vllm
    dist-train serve runs/news_sentiment --engine vllm --port 8001
    dist-train predict runs/news_sentiment texts.csv scores.csv --url http://127.0.0.1:8000

The engine vllm serves a classifier of texts, with its adapter merged into the weights, at /classify: vLLM in a process
and an environment of its own, which `make vllm` builds (.venv-vllm, or what DIST_TRAIN_VLLM names). It listens on
loopback unless --host says otherwise; it has no authentication. When it is healthy, stdout gets a line of JSON: its
address, the name of the model there, which is the SHA-256 of its weights, and the seconds that it took to start.
SIGTERM and Ctrl-C end it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from dist_train.commands.parser import command_parser, path


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", type=path, help="run folder, or a trained model")
    parser.add_argument("--engine", choices=["vllm"], required=True, help="what computes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="until it must be healthy (default: 600)"
    )
    arguments = parser.parse_args(argv)

    from dist_train.serving.vllm_server import announcement, serve_with_vllm, served_model

    model, host, port = served_model(arguments.run_dir), arguments.host, arguments.port

    def announce(seconds: float) -> None:
        print(announcement(model, host, port, seconds), flush=True)

    serve_with_vllm(model, host, port, os.environ, arguments.timeout, announce)
