"""Processes that answer HTTP: uvicorn, which replaces a worker that has died and ends one request after another."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from tempfile import mkdtemp

from dist_train.errors import UserError
from dist_train.serving.settings import Settings

_SECONDS_TO_FINISH = 30
_SECONDS_TO_REPLY = 30


def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Answer requests until SIGTERM or SIGINT; those that have begun are finished.

    Raises:
        UserError: the packages of the extra `serve` are not installed, or what the settings name cannot be read.
    """
    try:
        import uvicorn

        import dist_train.serving.app as app
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install 'dist_train[serve]'") from None
    app.make_app(settings)  # its mistakes are found here, not in a worker
    settings.to_environment()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn sends itself the signal again when it has finished
    sums = mkdtemp(prefix="dist_train_metrics_") if workers > 1 else None
    if sums is not None:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = sums
    try:
        uvicorn.run(
            f"{app.__name__}:{app.from_environment.__name__}",
            factory=True,
            host=host,
            port=port,
            workers=workers,
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
