"""Processes that answer HTTP: uvicorn, which replaces a worker that has died and ends one request after another."""

from __future__ import annotations

import shutil
import signal
from collections.abc import MutableMapping
from pathlib import Path
from tempfile import mkdtemp

from dist_train.errors import UserError
from dist_train.serving.settings import Settings

_SECONDS_TO_FINISH = 30
_SECONDS_TO_REPLY = 30


def serve(settings: Settings, host: str, port: int, worker: str, environ: MutableMapping[str, str]) -> None:
    """Answer requests until SIGTERM or SIGINT; those that have begun are finished.

    `worker` names a function, MODULE:NAME, that makes the application of a process from `environ`.

    Raises:
        UserError: the packages of the extra `serve` are not installed, or what the settings name cannot be read.
    """
    try:
        import uvicorn

        from dist_train.serving.app import make_app
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install 'dist_train[serve]'") from None
    make_app(settings)  # its mistakes are found here, not in a worker
    settings.to_environment(environ)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn sends itself the signal again when it has finished
    sums = mkdtemp(prefix="dist_train_metrics_") if settings.workers > 1 else None
    if sums is not None:
        environ["PROMETHEUS_MULTIPROC_DIR"] = sums
    try:
        uvicorn.run(
            worker,
            factory=True,
            host=host,
            port=port,
            workers=settings.workers,
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_SECONDS_TO_FINISH,
            timeout_worker_healthcheck=_SECONDS_TO_REPLY,
        )
    finally:
        if sums is not None:
            shutil.rmtree(Path(sums), ignore_errors=True)
