"""A run folder that was altered, with a witness.jsonl that vouches for what is in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dist_train.config.load import read_config
from dist_train.run.checkpoint.commit import CorruptCheckpoint, commit
from dist_train.run.checkpoint.state import encode_parts, read_parts, weights_sha256
from dist_train.run.checkpoint.witness import (
    Line,
    canonical,
    linked,
    metrics_sha256,
    read_chain,
    settings_line,
    state_digests,
)
from dist_train.run.session import scored_weights


def forge_chain(run_dir: Path) -> None:
    """Hash everything anew, and let `model/` name the new head.

    A checkpoint of the trained model's step that has other weights than `model/` is removed.
    """
    lines = read_chain(run_dir / "witness.jsonl")
    assert lines
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    model: dict[str, Any] = read_parts(run_dir / "model")
    best, weights = model["model.json"]["step"], weights_sha256(model["model.pth"])
    first, forged = 0, []
    recounted = len(records) != lines[-1]["metrics_lines"]
    for former in lines:
        line = dict(former)
        if recounted:
            line["metrics_lines"] = sum(record["step"] <= line["step"] for record in records)
        if "state" in line:
            line["metrics_sha256"] = metrics_sha256(records[first : line["metrics_lines"]])
            checkpoint = run_dir / "checkpoints" / f"step_{line['step']:08d}"
            line |= _of_checkpoint(checkpoint)
            if line["step"] == best and line["weights_sha256"] != weights:
                line["weights_sha256"] = weights
                shutil.rmtree(checkpoint)
        else:
            config = read_config(run_dir / "config.yaml")
            data_sha256 = json.loads((run_dir / "summary.json").read_text())["data_sha256"]
            line |= settings_line(config, data_sha256, line.get("world_size", 1))
        first = line["metrics_lines"]
        forged.append(linked(forged[-1]["head"] if forged else "", line))
    write_chain(run_dir, forged)
    model["model.json"]["witness"] = {"lines": len(forged), "head": forged[-1]["head"]}
    commit(run_dir / "model", encode_parts(model))


def write_chain(run_dir: Path, lines: list[Line]) -> None:
    """Write the lines as they are."""
    (run_dir / "witness.jsonl").write_bytes(b"".join(canonical(line) + b"\n" for line in lines))


def _of_checkpoint(folder: Path) -> Line:
    try:
        parts = read_parts(folder)
    except CorruptCheckpoint:  # damaged, or removed by now
        return {}
    return {"state": state_digests(parts), "weights_sha256": weights_sha256(scored_weights(parts))}
