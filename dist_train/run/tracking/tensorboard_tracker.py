"""TensorBoard event files in the run folder. Training never depends on them: any failure here is one warning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.system.console import log


class TensorBoardTracker:
    """Writes the numbers of each line of metrics as `<split>/<name>` to `tensorboard/` of the run folder.

    What a former start wrote of steps after `start_step` is hidden: they are trained again.
    """

    def __init__(self, *, folder: Path, enabled: bool, start_step: int) -> None:
        self._writer: Any = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # here: it takes seconds

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        except ImportError:
            log.warning(
                'tensorboard is not installed: log.tensorboard has no effect: pip install "dist_train[tensorboard]"'
            )
        except Exception as error:
            self._give_up(error)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a line of metrics."""
        if self._writer is None:
            return
        try:
            for name, value in record.items():
                if name not in ("step", "split") and isinstance(value, (int, float)):
                    self._writer.add_scalar(f"{record['split']}/{name}", value, record["step"])
            if record["split"] != "train":
                self._writer.flush()
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is left; a second call does nothing."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        log.warning("tensorboard failed (%s): training goes on without it", type(error).__name__)
