"""What a run folder claims of its run: lines of metrics, checkpoints, the trained model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.config.compatibility import FORMATS
from dist_train.errors import UserError
from dist_train.run.checkpoint.checkpoints import Checkpoints
from dist_train.run.checkpoint.commit import CorruptCheckpoint
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import Parts, read_parts, weights_sha256, with_digests
from dist_train.run.checkpoint.trained_model import DESCRIPTION, read_trained_model
from dist_train.run.checkpoint.witness import BrokenChain, Line, read_chain
from dist_train.run.session import scored_weights


@dataclass
class Evidence:
    """What a run folder claims, read once: a run that goes on meanwhile may drop a checkpoint.

    Of the tensors in `checkpoints` and in `model` it holds digests: it is sent to every rank. `scored_sha256` is that
    of the weights in each checkpoint that are evaluated, `model_sha256` that of those in `model/model.pth`. `chain` are
    the lines of witness.jsonl, `broken_chain` a step and what is wrong with the file there.
    """

    lines: list[dict[str, Any]]
    checkpoints: dict[int, Parts]
    damaged: dict[int, str]
    summary: dict[str, Any] | None
    model: Parts | None
    model_sha256: str
    model_damage: str | None
    changes: list[dict[str, Any]]
    scored_sha256: dict[int, str]
    chain: list[Line] | None
    broken_chain: tuple[int, str] | None

    @staticmethod
    def of(folder: RunFolder) -> Evidence:
        """Read a run folder; nothing in it is changed."""
        stored = Checkpoints(folder.checkpoints, keep=1)
        checkpoints, damaged, scored = {}, {}, {}
        for step in stored.steps():
            try:
                parts = read_parts(stored.path(step))
                scored[step], checkpoints[step] = weights_sha256(scored_weights(parts)), with_digests(parts)
            except CorruptCheckpoint as damage:
                if stored.path(step).is_dir():
                    damaged[step] = str(damage)
        summary = _read_json(folder.summary) if folder.summary.is_file() else None
        model = model_damage = None
        model_sha256 = ""
        if summary:
            try:
                parts = read_trained_model(folder.model)
                model, model_sha256 = with_digests(parts), weights_sha256(parts["model.pth"])
            except CorruptCheckpoint as damage:
                model_damage = str(damage)
        changes = _read_lines(folder.changes) if folder.changes.is_file() else []
        chain = broken = None
        try:
            chain = read_chain(folder.witness)  # before the lines of metrics, which are written first
        except BrokenChain as damage:
            broken = (damage.step, str(damage))
        lines = _read_lines(folder.metrics)
        return Evidence(
            lines, checkpoints, damaged, summary, model, model_sha256, model_damage, changes, scored, chain, broken
        )

    @property
    def last_step(self) -> int:
        """The last step that anything is claimed of."""
        return max([line["step"] for line in self.lines] + list(self.checkpoints), default=0)

    @property
    def origin(self) -> dict[str, Any] | None:
        """What the run says of its machine and data: in its newest checkpoint, else in the summary."""
        if self.checkpoints:
            state: dict[str, Any] = self.checkpoints[max(self.checkpoints)]["state.json"]
            return state
        return self.summary

    @property
    def format(self) -> int:
        """Format number of the newest checkpoint, else of the trained model."""
        if self.checkpoints:
            return int(self.checkpoints[max(self.checkpoints)]["state.json"].get("format", 1))
        return int(self.model[DESCRIPTION]["format"]) if self.model else FORMATS["checkpoint"]

    @property
    def best_step(self) -> int:
        """The step of the trained model; 0: there is none yet."""
        return int(self.summary["best_step"] or self.summary["steps"]) if self.summary else 0

    def starts(self, last: int) -> list[int]:
        """Every step below `last` from which a replay can begin; all after the last change of the configuration."""
        first = self.start(0, last)
        return sorted({first, *(step for step in self.checkpoints if first <= step < last)})

    def start(self, first: int, last: int) -> int:
        """Where a replay of the steps after `first` can begin: at a sound checkpoint, or at 0.

        A run whose configuration was changed on the way is replayed from the last change on.
        """
        change = max((c["step"] for c in self.changes if c["step"] < last), default=0)
        before = [step for step in self.checkpoints if change <= step <= max(first, change)]
        if before or not change:
            return max(before, default=0)
        after = [step for step in self.checkpoints if change <= step < last]
        if not after:
            raise UserError(
                f"the configuration was changed at step {change}, and no sound checkpoint from there on is left to "
                "replay from"
            )
        return min(after)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            known = isinstance(record["step"], int)
        except (ValueError, KeyError, TypeError):
            known = False
        if known:
            records.append(record)
        elif number < len(lines):  # the last line may be one that is just being written
            raise UserError(f"{file}, line {number}: is not a line of a run")
    return records


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"{file}: cannot be read") from None
    return content
