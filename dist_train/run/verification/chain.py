"""Compare a run folder with its witness.jsonl: what was altered, swapped or hashed anew is found without a replay."""

from __future__ import annotations

from dist_train.config.schema import JobConfig
from dist_train.run.checkpoint.trained_model import DESCRIPTION
from dist_train.run.checkpoint.witness import (
    Line,
    differing_settings,
    metrics_sha256,
    settings_line,
    state_digests,
    state_lines,
)
from dist_train.run.verification.evidence import Evidence
from dist_train.run.verification.replay import Report


def compare_chain(evidence: Evidence, config: JobConfig, first: int, last: int, report: Report) -> None:
    """Note what is not that of the chain: settings, trained model, checkpoints and lines of the steps (first, last].

    A run of an earlier version has no chain; the report says so.
    """
    if evidence.broken_chain:
        report.differ(*evidence.broken_chain)
        return
    claimed = (evidence.model or {}).get(DESCRIPTION, {}).get("witness")
    if evidence.chain is None:
        if claimed:
            report.differ(0, f"there is no witness.jsonl, and the trained model's {DESCRIPTION} names its head")
        else:
            report.notes.append("there is no witness.jsonl: an earlier version has trained the run")
        return
    report.witness_lines, report.witness_head = len(evidence.chain), evidence.chain[-1]["head"]
    _compare_settings(evidence, config, report)
    if evidence.model is not None:
        _compare_model(evidence, claimed, report)
    _compare_states(evidence, first, last, report)
    _compare_metrics(evidence, first, last, report)


def _compare_settings(evidence: Evidence, config: JobConfig, report: Report) -> None:
    assert evidence.chain is not None
    recorded = next(line for line in reversed(evidence.chain) if "config" in line)
    data, world = recorded["data_sha256"], recorded.get("world_size", 1)
    origin = evidence.origin
    if origin and max(evidence.checkpoints, default=evidence.last_step) > recorded["step"]:
        data, world = origin["data_sha256"], origin["world_size"]
    now = settings_line(config, data, world)
    names = differing_settings(recorded, now)
    if names:
        report.differ(recorded["step"], f"{', '.join(names)}: the run's configuration is not that of witness.jsonl")


def _compare_model(evidence: Evidence, claimed: Line | None, report: Report) -> None:
    assert evidence.chain is not None
    assert evidence.model is not None
    step = evidence.model[DESCRIPTION]["step"]
    heads = [line["head"] for line in evidence.chain]
    if not claimed or claimed not in [{"lines": number, "head": head} for number, head in enumerate(heads, 1)]:
        report.differ(step, f"the trained model's {DESCRIPTION} does not name the head of witness.jsonl")
    state = state_lines(evidence.chain).get(step)
    if state is None or state["weights_sha256"] != evidence.model_sha256:
        report.differ(step, "the trained model's weights are not those of witness.jsonl")


def _compare_states(evidence: Evidence, first: int, last: int, report: Report) -> None:
    for step, line in state_lines(evidence.chain or []).items():
        if step not in evidence.checkpoints or not first < step <= last:
            continue
        digests = state_digests(evidence.checkpoints[step])
        parts = [part for part in [*line["state"], *digests] if line["state"].get(part) != digests.get(part)]
        if parts:
            report.differ(step, f"the checkpoint's {parts[0]} is not that of witness.jsonl")
        elif line["weights_sha256"] != evidence.scored_sha256[step]:
            report.differ(step, "the checkpoint's weights are not those of witness.jsonl")


def _compare_metrics(evidence: Evidence, first: int, last: int, report: Report) -> None:
    former = 0
    for line in evidence.chain or []:
        begin, former = former, line["metrics_lines"]
        if "state" not in line or not first < line["step"] <= last:
            continue
        if metrics_sha256(evidence.lines[begin:former]) != line["metrics_sha256"]:
            report.differ(
                line["step"], f"lines {begin + 1} to {former} of metrics.jsonl are not those of witness.jsonl"
            )
