"""Answer HTTP requests with the probabilities of a trained classifier.

    dist-train serve credit_risk.onnx
    dist-train serve runs/credit_risk --port 8000 --workers 4 --api-key-file keys.txt
    dist-train serve runs/news_sentiment --engine vllm
    dist-train predict runs/news_sentiment texts.csv scores.csv --url http://127.0.0.1:8000

The engine onnx serves the model of a table, from a run or from a file of `dist-train export`. POST /v1/score scores
records: {"records": [{"age": 31, "purpose": "car", ...}]}; null is a missing cell. /docs describes all with an example
of the model. /v2/models/NAME is the Open Inference Protocol; /metrics is Prometheus'. It listens on loopback unless
--host says otherwise, which needs --api-key-file: a key a line, sent as X-API-Key. Each request is a line of JSON on
stdout, without values of the records. SIGTERM ends the server after the requests that have begun. A worker that dies is
replaced.

The engine vllm serves a classifier of texts, with its adapter merged into the weights, at /classify: vLLM in a process
and an environment of its own, which `make vllm` builds (.venv-vllm, or what DIST_TRAIN_VLLM names). It listens on
loopback unless --host says otherwise; it has no authentication. When it is healthy, stdout gets a line of JSON: its
address, the name of the model there, which is the SHA-256 of its weights, and the seconds that it took to start.
SIGTERM and Ctrl-C end it.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dist_train.commands.parser import command_parser, path
from dist_train.errors import UserError


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("model", type=path, help="run folder, a trained model, or an .onnx file")
    parser.add_argument("--engine", choices=["onnx", "vllm"], default="onnx", help="what computes (default: onnx)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    of_engine = {"onnx": _add_onnx(parser), "vllm": _add_vllm(parser)}
    arguments = parser.parse_args(argv)
    for engine, options in of_engine.items():
        for option in options:
            if engine != arguments.engine and getattr(arguments, option.dest) != option.default:
                raise UserError(f"{option.option_strings[0]}: is an option of --engine {engine}")
    if not 0 < arguments.port < 1 << 16:
        raise UserError(f"--port {arguments.port}: must be 1 to 65535")
    (_serve_onnx if arguments.engine == "onnx" else _serve_vllm)(arguments)


def _add_onnx(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    add = parser.add_argument_group("engine onnx").add_argument
    return [
        add("--workers", type=int, default=1, help="processes that answer (default: 1)"),
        add("--reasons", action="store_true", help="let a request ask for reasons; the model must be a run"),
        add("--name", help="name of the model in /v2/models (default: that of the run or file)"),
        add("--api-key-file", help="file of API keys, one a line"),
        add("--max-rows", type=int, default=10_000, help="most rows of a request (default: 10,000)"),
        add("--max-bytes", type=int, default=16 << 20, help="most bytes of a request (default: 16 MiB)"),
        add("--rate", type=float, default=0.0, help="requests a second of a client and worker (default: any)"),
        add(
            "--contract",
            choices=("warn", "refuse", "ignore"),
            default="warn",
            help="cells unlike those of training: unknown categories, other ranges, missing cells (default: warn)",
        ),
    ]


def _add_vllm(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    add = parser.add_argument_group("engine vllm").add_argument
    help_text = "until it must be healthy (default: 600)"
    return [add("--timeout", type=float, default=600.0, metavar="SECONDS", help=help_text)]


def _serve_onnx(arguments: argparse.Namespace) -> None:
    if not _is_loopback(arguments.host) and arguments.api_key_file is None:
        raise UserError(f"--host {arguments.host}: other machines could ask without a key: name --api-key-file")
    for name in ("workers", "max_rows", "max_bytes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    if arguments.reasons and arguments.model.suffix.lower() == ".onnx":
        raise UserError(f"--reasons: {arguments.model} has no gradients: name the run that it was exported from")
    if not arguments.rate >= 0:
        raise UserError(f"--rate {arguments.rate}: must be 0 or more")

    from dist_train.serving.server import serve
    from dist_train.serving.settings import Settings

    with TemporaryDirectory(prefix="dist_train_model_") as folder:
        settings = Settings(
            model=str(_onnx_file(arguments.model, Path(folder))),
            name=arguments.name or arguments.model.resolve().stem,
            api_key_file=arguments.api_key_file,
            max_rows=arguments.max_rows,
            max_bytes=arguments.max_bytes,
            rate=arguments.rate,
            contract=arguments.contract,
            workers=arguments.workers,
            run=str(arguments.model) if arguments.reasons else None,
        )
        serve(settings, arguments.host, arguments.port, f"{__name__}:{worker.__name__}", os.environ)


def worker() -> Any:
    """The application of a worker process."""
    from dist_train.serving.app import make_app
    from dist_train.serving.settings import Settings

    return make_app(Settings.from_environment(os.environ))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _onnx_file(model: Path, folder: Path) -> Path:
    """The file itself, or one that is exported from a run into `folder`."""
    if model.suffix.lower() == ".onnx":
        if not model.is_file():
            raise UserError(f"{model}: there is no such file")
        return model
    from dist_train.distributed.collectives import Collectives
    from dist_train.distributed.world import World
    from dist_train.run.scoring.predictor import Predictor
    from dist_train.serving.export import export_model

    file = folder / "model.onnx"
    export_model(Predictor(model, Collectives(World())), file)
    return file


def _serve_vllm(arguments: argparse.Namespace) -> None:
    from dist_train.serving.vllm_server import announcement, serve_with_vllm, served_model

    model, host, port = served_model(arguments.model), arguments.host, arguments.port

    def announce(seconds: float) -> None:
        print(announcement(model, host, port, seconds), flush=True)

    serve_with_vllm(model, host, port, os.environ, arguments.timeout, announce)
