"""The ranks of a job under the watchdog: what passes through it, and what ends every rank."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from torch.distributed import Store

from dist_train.distributed.collectives import Collectives
from dist_train.distributed.stopping import Launcher
from dist_train.errors import EXIT_FAULT, LauncherDied, PeerFailed, Stopped, TrainingFault, UserError
from dist_train.system.console import log
from dist_train.watchdog import watchdog


def watched(
    collectives: Collectives,
    store: Store,
    *,
    timeout_seconds: float,
    report_file: Path | None,
    launcher: Launcher | None = None,
    title: str = "",
) -> AbstractContextManager[None]:
    """Watch over the ranks inside the block; entered by all of them. `store` is that of `process_group`.

    UserError, TrainingFault and Stopped pass through. Any other failure, on any rank, ends every rank with EXIT_FAULT
    within `timeout_seconds` and ten seconds; the report is appended to `report_file`, None: it goes to stderr.
    """

    def warn_of_pause(seconds: float) -> None:
        if collectives.is_main:
            log.warning(
                "the ranks were suspended for %.0f s: training goes on; such time counts for no timeout", seconds
            )

    settings = watchdog.Settings(
        timeout_seconds=timeout_seconds,
        exit_code=EXIT_FAULT,
        report_file=report_file,
        title=title,
        launcher_died=None if launcher is None else lambda: launcher.died,
        passed=(UserError, TrainingFault, Stopped),
        effects=(PeerFailed, LauncherDied),
        paused=warn_of_pause,
    )
    return watchdog.watched(
        collectives.rank,
        collectives.heartbeat,
        store,
        lambda value: collectives.all_gather_object(lambda: value),
        settings,
    )
