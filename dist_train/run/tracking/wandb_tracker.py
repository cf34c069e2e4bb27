"""Weights & Biases. Training never depends on it: any failure here is one warning, and so is a server in silence."""

from __future__ import annotations

import json
import netrc
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from dist_train.run.tracking.patience import in_time
from dist_train.system.console import log
from dist_train.system.files import write_atomically

Mode = Literal["online", "offline", "disabled"]

_SKIPPED = {"step", "split", "per_class", "confusion_matrix"}


def choose_mode(mode: Literal["auto"] | Mode, environ: Mapping[str, str]) -> Mode:
    """`auto` -> WANDB_MODE where it is set, else online when an API key is found, else offline."""
    if mode != "auto":
        return mode
    for chosen in get_args(Mode):
        if environ.get("WANDB_MODE") == chosen:
            return cast(Mode, chosen)
    return "online" if environ.get("WANDB_API_KEY") or _key_in_netrc(environ) else "offline"


class WandbTracker:
    """One wandb run for one run folder, also after a resume. No step is sent twice.

    `wandb/run.json` in the run folder keeps the id of the wandb run and the last step that was sent. `last_step` is the
    last step in metrics.jsonl before a resume cuts it: later resumes no longer see that step in the file. A call that
    takes longer than `patience_seconds` is the last one: the other ranks wait meanwhile.
    """

    def __init__(
        self,
        *,
        folder: Path,
        name: str,
        project: str,
        mode: Mode,
        config: Mapping[str, Any],
        last_step: int,
        patience_seconds: float = 30.0,
    ) -> None:
        self._patience_seconds = patience_seconds
        self._sent_step = 0
        self._run: Any = None
        if mode == "disabled":
            return
        try:
            run_id, self._sent_step = _remembered(folder / "wandb" / "run.json", last_step)
            self._run = self._in_time(
                lambda: _opened(
                    patience_seconds,
                    dir=folder,
                    id=run_id,
                    resume="allow",
                    name=name,
                    project=project,
                    mode=mode,
                    config=dict(config),
                )
            )
        except ImportError:
            log.warning("wandb is not installed: metrics go to metrics.jsonl alone")
        except Exception as error:
            self._give_up(error)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a line of metrics under `<split>/<name>`."""
        run = self._run
        if run is None or record["step"] <= self._sent_step:
            return
        values = {f"{record['split']}/{name}": value for name, value in record.items() if name not in _SKIPPED}
        try:
            self._in_time(lambda: run.log(values, step=record["step"]))
        except Exception as error:
            self._give_up(error)

    def log_summary(self, summary: Mapping[str, Any]) -> None:
        """Show the metrics of the best weights for the run, in place of those of its last line.

        `valid/<name>`, `test/<name>`, and what else of summary.json a table of runs is sorted by.
        """
        run = self._run
        if run is None:
            return
        values = {name: summary[name] for name in ("best_step", "selected_by", "weights_sha256") if name in summary}
        for split in ("valid", "test"):
            scores = summary[split] or {}
            values |= {f"{split}/{name}": value for name, value in scores.items() if name not in _SKIPPED}
        try:
            self._in_time(lambda: run.summary.update(values))
        except Exception as error:
            self._give_up(error)

    def close(self, *, failed: bool = False) -> None:
        """Finish the run; a second call does nothing."""
        run, self._run = self._run, None
        try:
            if run is not None:
                self._in_time(lambda: run.finish(exit_code=int(failed)))
        except Exception as error:
            self._give_up(error)

    def _in_time(self, call: Callable[[], Any]) -> Any:
        """What a call returns. Raises TimeoutError where it takes too long; it is left to itself then."""
        return in_time(call, self._patience_seconds, "wandb")

    def _give_up(self, error: Exception) -> None:
        self._run = None
        log.warning("wandb failed (%s): training goes on without it", type(error).__name__)


def _opened(patience_seconds: float, **arguments: Any) -> Any:
    import wandb  # here, since it can take seconds as well

    # No console capture, no git or host metadata: neither environment nor a secret in an argument leaves.
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        init_timeout=patience_seconds,
    )
    return wandb.init(settings=settings, **arguments)


def _remembered(file: Path, last_step: int) -> tuple[str, int]:
    """The id of the run and the last step it was sent; a new id where none is known."""
    known: dict[str, Any] = {}
    if file.exists():
        known = json.loads(file.read_bytes())
        known["sent_step"] = max(known["sent_step"], last_step)
    else:
        known = {"id": secrets.token_hex(4), "sent_step": 0}
        file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(known).encode())
    return known["id"], known["sent_step"]


def _key_in_netrc(environ: Mapping[str, str]) -> bool:
    path = environ.get("NETRC") or str(Path("~/.netrc").expanduser())
    try:
        hosts = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
