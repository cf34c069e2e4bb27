"""witness.jsonl: a hash chain over the states of a run, one line a checkpoint.

A line of settings comes first, and again wherever the run went on with other ones: the SHA-256 of the data, and all
keys of the configuration that results depend on. A line of a state has the SHA-256 of each part of a checkpoint, of the
weights that are evaluated, and of the lines of metrics since the line before. `head` is the SHA-256 of the head before
it (of the first line: of nothing) followed by the line's other values as canonical JSON: sorted keys, no spaces, ASCII.
No clock, host or path is in a line. In the exact mode it does not depend on the number of ranks either.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_train.config.compatibility import FORMATS, changed_settings, require_format, settings_of
from dist_train.config.schema import JobConfig
from dist_train.run.checkpoint.state import Parts, tensor_sha256
from dist_train.system.console import log
from dist_train.system.files import write_atomically

OF_THE_CLOCK = ("samples_per_second", "train_seconds")
"""Values of lines of metrics and of progress that are not the same in another run."""

Line = dict[str, Any]


class BrokenChain(Exception):
    """witness.jsonl is not what was written; `step` is that of the line where it shows."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Witness:
    """The chain of a run, where it is written: on rank 0."""

    def __init__(self, file: Path, metrics: Path) -> None:
        self._file = file
        self._metrics = metrics
        self._lines: list[Line] = []
        self._offset = 0
        """Bytes of metrics.jsonl that the last line covers."""

    def begin(self, step: int, settings: Line, *, kept: bool) -> None:
        """Go on from the checkpoint of `step`; 0: from the initial weights. Lines of later steps are cut off.

        `settings` are those of `settings_line`. `kept`: a run that nobody had stopped has a checkpoint of this step as
        well. Where it has none, the line goes, so that the chain does not depend on interruptions.
        """
        lines = self._lines_up_to(step)
        former = next((line for line in reversed(lines) if "config" in line), None)
        same = former is not None and not differing_settings(former, settings)
        if same and not kept and "state" in lines[-1] and lines[-1]["step"] == step:
            lines.pop()
        content = self._metrics.read_bytes().splitlines(keepends=True)
        covered = lines[-1]["metrics_lines"] if lines else len(content)
        self._lines = lines
        self._offset = sum(map(len, content[:covered]))
        if not same:
            self._link({"step": step, **settings, "metrics_lines": covered})
        write_atomically(self._file, b"".join(canonical(line) + b"\n" for line in lines))

    def add(self, step: int, parts: Parts, weights: str, metrics_bytes: int) -> None:
        """Append the line of a checkpoint that is about to be written; metrics.jsonl has so many bytes.

        `weights` is the SHA-256 of the weights that are evaluated. Raises OSError where the file cannot be written.
        """
        with self._metrics.open("rb") as stream:
            stream.seek(self._offset)
            lines = stream.read(max(metrics_bytes - self._offset, 0)).splitlines()
        line = self._link(
            {
                "step": step,
                "state": state_digests(parts),
                "weights_sha256": weights,
                "metrics_lines": self._lines[-1]["metrics_lines"] + len(lines),
                "metrics_sha256": metrics_sha256(map(json.loads, lines)),
            }
        )
        with self._file.open("ab") as stream:  # what a kill leaves of a line is cut off by `begin`
            stream.write(canonical(line) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._offset = metrics_bytes

    def description(self) -> dict[str, Any]:
        """What `model/` says of the chain: its lines, and the head of the last one. None are on the ranks but 0."""
        return {"lines": len(self._lines), "head": self._lines[-1]["head"] if self._lines else ""}

    def _lines_up_to(self, step: int) -> list[Line]:
        try:
            lines = read_chain(self._file) or []
        except BrokenChain as damage:
            log.warning("%s; a new chain begins at step %d", damage, step)
            return []
        states = [place for place, line in enumerate(lines) if "state" in line and line["step"] <= step]
        if states:
            return lines[: states[-1] + 1]
        return [line for line in lines if "config" in line and line["step"] < step][:1]

    def _link(self, line: Line) -> Line:
        self._lines.append(linked(self._lines[-1]["head"] if self._lines else "", line))
        return self._lines[-1]


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and without spaces, ASCII."""
    plain = json.loads(json.dumps(value))  # keys are text, and sorted as text
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def linked(former_head: str, line: Line) -> Line:
    """The line with its head, which follows that of the line before; an empty text: there is none."""
    content = {name: value for name, value in line.items() if name != "head"}
    return content | {"head": hashlib.sha256(former_head.encode() + canonical(content)).hexdigest()}


def read_chain(file: Path) -> list[Line] | None:
    """The lines, whose heads follow from each other; None: there is no such file.

    A last line without an end is being written, or was when the run was killed: it is left out.

    Raises:
        BrokenChain: a line is not what was written.
        UserError: the format is not one that this version reads.
    """
    try:
        content = file.read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise BrokenChain(f"{file}: cannot be read", 0) from None
    lines: list[Line] = []
    for number, text in enumerate(content, 1):
        step = lines[-1]["step"] if lines else 0
        try:
            line = json.loads(text)
            known = _is_known(line) and (bool(lines) or "config" in line)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            known = False
        if known and "config" in line:
            require_format("witness.jsonl", line["format"], f"{file}, line {number}")
        if not known:
            raise BrokenChain(f"{file}, line {number}: is not a line of a chain", step)
        if linked(lines[-1]["head"] if lines else "", line) != line:
            raise BrokenChain(f"{file}, line {number}: the chain is broken: its head does not follow", line["step"])
        lines.append(line)
    if not lines:
        raise BrokenChain(f"{file}: is empty", 0)
    return lines


def _is_known(line: Line) -> bool:
    """Whether a line has what lines have; raises errors of many types where it has not."""
    numbers: list[Any] = [line["step"], line["metrics_lines"]]
    texts: list[Any] = [line["head"]]
    if "config" in line:
        settings_of(line["config"])
        numbers.append(line["format"])
        texts.append(line["data_sha256"])
    else:
        texts += [line["weights_sha256"], line["metrics_sha256"], *line["state"].values()]
    return all(type(number) is int and number >= 0 for number in numbers) and all(isinstance(t, str) for t in texts)


def settings_line(config: JobConfig, data_sha256: str, world_size: int) -> Line:
    """Settings that results depend on; in the fast mode the number of ranks is one of them."""
    line = {
        "format": FORMATS["witness.jsonl"],
        "data_sha256": data_sha256,
        "config": settings_of(json.loads(json.dumps(asdict(config)))),
    }
    return line if config.train.virtual_ranks else line | {"world_size": world_size}


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what differs in two lines of settings; the former may be of an older version."""
    names = [name for name in ("data_sha256", "world_size") if before.get(name) != now.get(name)]
    return names + changed_settings(before["config"], now["config"])


def state_digests(parts: Parts) -> dict[str, str]:
    """SHA-256 of each part of a checkpoint, and of its progress without the clock.

    `parts` may hold the `tensor_sha256` of each tensor in its place.
    """
    digests = {
        name: tensors_sha256(part) if name.endswith(".pth") else _sha256(part)
        for name, part in parts.items()
        if name != "state.json"
    }
    return digests | {"progress": progress_sha256(parts["state.json"]["progress"])}


def tensors_sha256(part: Mapping[str, Any]) -> str:
    """SHA-256 of the names of tensors and their `tensor_sha256`, which may be in their place."""
    return _sha256({name: value if isinstance(value, str) else tensor_sha256(value) for name, value in part.items()})


def progress_sha256(progress: Mapping[str, Any]) -> str:
    """SHA-256 of where training stands, without the clock."""
    return _sha256(_without_clock(progress))


def metrics_sha256(records: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of lines of metrics as canonical JSON, without the clock."""
    return hashlib.sha256(b"".join(canonical(_without_clock(record)) + b"\n" for record in records)).hexdigest()


def state_lines(lines: Sequence[Line]) -> dict[int, Line]:
    """The line of each step that has a state; of two of one step, the later one."""
    return {line["step"]: line for line in lines if "state" in line}


def _without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in OF_THE_CLOCK}


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
