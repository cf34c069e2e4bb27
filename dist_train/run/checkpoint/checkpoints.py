"""The checkpoints of a run: `step_00000500/` folders, the newest that verifies wins, the best is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import UserError
from dist_train.run.checkpoint.commit import CorruptCheckpoint, commit, remove
from dist_train.run.checkpoint.state import Parts, encode_parts, read_parts

_PREFIX = "step_"


@dataclass(frozen=True)
class Found:
    """A checkpoint that verified and could be decoded."""

    step: int
    parts: Parts

    def without_tensors(self) -> Found:
        """The same, with its JSON parts alone."""
        return Found(self.step, {name: part for name, part in self.parts.items() if name.endswith(".json")})


class Checkpoints:
    """Checkpoints below one folder. Rank 0 alone writes; `confirm` raises where it no longer may."""

    def __init__(self, folder: Path, keep: int, confirm: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.keep = keep
        self._confirm = confirm

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        names = [path.name for path in self.folder.glob(f"{_PREFIX}*")] if self.folder.is_dir() else []
        return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdecimal())

    def write(self, step: int, parts: Parts, best_step: int | None) -> None:
        """Commit a checkpoint, then remove older ones beyond the newest `keep` and the best.

        Raises:
            OSError: it could not be written; the checkpoints that were there are untouched.
        """
        self.folder.mkdir(exist_ok=True)  # not its parents: a run folder that was removed must not be made again
        commit(self.path(step), encode_parts(parts), self._confirm)
        newest = self.steps()[-self.keep :]
        for old in self.steps():
            if old not in newest and old != best_step:
                remove(self.path(old))

    def newest(self) -> tuple[Found | None, list[str]]:
        """The newest checkpoint that verifies, None when there is none; and why newer ones were skipped.

        Raises:
            UserError: a checkpoint is of a format that this version does not read.
        """
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                return Found(step, read_parts(self.path(step))), skipped
            except CorruptCheckpoint as damage:
                skipped.append(str(damage))
        return None, skipped

    def read(self, step: int) -> Parts:
        """The parts of one checkpoint.

        Raises:
            UserError: it is not there, does not verify, or is of a format that this version does not read.
        """
        if step not in self.steps():
            have = ", ".join(str(s) for s in self.steps()) or "none"
            raise UserError(f"{self.folder}: there is no checkpoint of step {step}; there is {have}")
        try:
            return read_parts(self.path(step))
        except CorruptCheckpoint as damage:
            raise UserError(f"the checkpoint of step {step} is damaged: {damage}") from None

    def drop_after(self, step: int) -> None:
        """Remove checkpoints of later steps: damaged ones that `newest` skipped, whose steps are trained again."""
        for later in self.steps():
            if later > step:
                remove(self.path(later))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"{_PREFIX}{step:08d}"
