"""How far a long piece of work has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_train.errors import printable
from dist_train.system.console import log, terminal

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress_bar(what: str, total: int | None, unit: str, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told what was done since it was told last; `total` None: nobody knows yet.

    `unit` is `rows` or `bytes`. Nothing is shown unless `shown`, as on ranks other than 0.
    """
    done = 0
    console = terminal()
    if not shown:
        yield lambda _count: None
        return
    if console.is_terminal and not console.quiet:
        columns = (
            TextColumn(printable(what), markup=False),
            BarColumn(),
            DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    began = last = time.monotonic()

    def tell(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            of_total = f" of {total:,}" if total else ""
            log.info("%s: %s%s %s, %s a second", what, f"{done:,}", of_total, unit, f"{done / (last - began):,.0f}")

    yield tell
