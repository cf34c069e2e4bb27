"""Train the steps of a run again, and compare what comes of them with what the run has recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dist_train.config.compatibility import redefined_metrics
from dist_train.config.load import config_from_tree
from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.run.checkpoint.state import Parts, tensor_sha256, weights_sha256
from dist_train.run.checkpoint.trained_model import CALIBRATION, DESCRIPTION, config_of_model, describe_model
from dist_train.run.checkpoint.witness import OF_THE_CLOCK, progress_sha256, state_lines, tensors_sha256
from dist_train.run.scoring.scores import score_splits
from dist_train.run.session import Session, build_loop, unsaved_weights
from dist_train.run.verification.challenge import Challenge, Window
from dist_train.run.verification.evidence import Evidence
from dist_train.tasks.registry import description_in
from dist_train.training.progress import migrated_progress
from dist_train.training.protocols import Record

# What a run notes of an evaluation.
_OF_THE_EVALUATION = ("best_value", "best_step", "evaluations_without_gain", "reductions", "evaluation_due")


@dataclass
class Report:
    """What a replay found. `difference` is None when everything agreed.

    Of `checkpoints` the tensors were compared one by one, of `states` the digests in witness.jsonl: their checkpoints
    were removed. `challenge`: windows were replayed, not the steps from `first_step` to `last_step`.
    `signed_by`: SHA-256 of the public key whose signature of `model/` was checked.
    `witness_lines` of witness.jsonl follow from each other up to `witness_head`; none: the run has no such file.
    """

    first_step: int
    last_step: int
    lines: int = 0
    checkpoints: int = 0
    states: int = 0
    model_compared: bool = False
    difference: str | None = None
    difference_step: int | None = None
    witness_lines: int = 0
    witness_head: str = ""
    challenge: Challenge[Window] | None = None
    signed_by: str = ""
    notes: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    trained_on: dict[str, str] = field(default_factory=dict)
    data_sha256: str = ""
    weights_sha256: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def add(self, window: Report) -> None:
        """Take over what the replay of a window has found."""
        self.lines += window.lines
        self.checkpoints += window.checkpoints
        self.states += window.states
        self.model_compared |= window.model_compared
        self.weights_sha256 = window.weights_sha256 or self.weights_sha256
        self.notes += [note for note in window.notes if note not in self.notes]
        if window.difference is not None and window.difference_step is not None:
            self.differ(window.difference_step, window.difference)

    def differ(self, step: int, what: str) -> None:
        """Note a difference; the first one of the earliest step counts."""
        if self.difference_step is None or step < self.difference_step:
            self.difference, self.difference_step = what, step


class Replay:
    """Listens to a training loop and compares what it says with what was recorded; alike on every rank.

    Rank 0 compares tensors: of a sharded model the others have none.
    """

    def __init__(self, evidence: Evidence, session: Session, report: Report, collectives: Collectives) -> None:
        self.evidence = evidence
        self.session = session
        self.report = report
        self.collectives = collectives
        self.pending = [x for x in evidence.lines if report.first_step < x["step"] <= report.last_step]
        self.checkpoints = dict(evidence.checkpoints)
        self.damaged = dict(evidence.damaged)
        self.states = state_lines(evidence.chain or [])
        self.best_weights: dict[str, Tensor] | None = None

    def run(self, config: JobConfig) -> None:
        """Train over the range; ends at its last step, or early after a difference."""
        build_loop(
            config, self.session, self.collectives,
            save=lambda _step: None, track=self.compare_line, wants_stop=self.is_over,
            put_off=False,
        ).run()  # fmt: skip
        self.compare_step()
        if self.session.progress.step < self.report.last_step and self.report.difference is None:
            self.report.differ(self.session.progress.step + 1, "the replay has no such step: it ends before")
        for line in self.pending:
            if line["step"] <= self.session.progress.step:
                what = f"metrics.jsonl has a {line.get('split')} line that the replay has not"
                self.report.differ(line["step"], what)

    def is_over(self) -> bool:
        """Asked before each step: is it the last one? Everything of the step before has been done by then."""
        self.compare_step()
        step, difference = self.session.progress.step, self.report.difference_step
        return step + 1 >= self.report.last_step or (difference is not None and step >= difference)

    def compare_line(self, record: Record) -> None:
        """A line of metrics."""
        step, split = record["step"], record["split"]
        line = next((x for x in self.pending if (x["step"], x.get("split")) == (step, split)), None)
        if line is None:
            if self.report.first_step < step <= self.report.last_step:
                self.report.differ(step, f"metrics.jsonl has no {split} line of this step")
            return
        self.pending.remove(line)
        self.report.lines += 1
        name = first_difference(line, json.loads(json.dumps(record)), self._redefined(self.evidence.format))
        if name:
            what = f"{split} {name}: recorded {line.get(name)!r}, replayed {record.get(name)!r}"
            self.report.differ(step, what)

    def compare_step(self) -> None:
        """The checkpoint of the step where the replay stands, where the run has kept one."""
        step = self.session.progress.step
        if step == self.evidence.best_step:
            self.best_weights = {n: t.detach().clone() for n, t in self.session.scored.state_dict().items()}
        if not self.report.first_step < step <= self.report.last_step:
            return
        damage = self.damaged.pop(step, None)
        if damage:
            self.report.differ(step, f"the checkpoint does not verify: {damage}")
        recorded = self.checkpoints.pop(step, None)
        if recorded is None:
            self._compare_with_chain(step)
            return
        self.report.checkpoints += 1
        replayed = self.session.tensor_parts()
        name = self.collectives.on_rank_zero(lambda: first_different_tensor(recorded, replayed))
        state = recorded["state.json"]
        if name:
            self.report.differ(step, f"the checkpoint's {name} is not what the replay has")
        elif not self._same_task(recorded):
            self.report.differ(step, "the checkpoint's task (fitted preprocessing) is not what the replay has")
        else:
            recorded_progress = migrated_progress(state["progress"])
            replayed_progress = self.session.progress.state_dict()
            if recorded_progress["evaluation_due"]:  # stopped before an evaluation that the replay has done by now
                replayed_progress |= {name: recorded_progress[name] for name in _OF_THE_EVALUATION}
            name = first_difference(recorded_progress, replayed_progress)
            if name:
                self.report.differ(step, f"the checkpoint's {name} is not what the replay has")

    def _compare_with_chain(self, step: int) -> None:
        """The state of a step whose checkpoint was removed."""
        line = self.states.pop(step, None)
        if line is None:
            return
        self.report.states += 1
        tensors = self.session.tensor_parts()
        replayed = self.collectives.on_rank_zero(lambda: {name: tensors_sha256(part) for name, part in tensors.items()})
        replayed["progress"] = progress_sha256(self.session.progress.state_dict())
        recorded = {name: digest for name, digest in line["state"].items() if not name.endswith(".json")}
        name = first_difference(recorded, replayed)
        if name:
            self.report.differ(step, f"the {name} of the state in witness.jsonl is not what the replay has")

    def compare_trained_model(self) -> None:
        """The trained model, its encoder, and the metrics that the summary claims for them."""
        report, summary = self.report, self.evidence.summary
        if summary is None:
            report.notes.append("the run is not finished: there is no trained model to compare yet")
            return
        if report.difference is not None:
            return
        best = self.evidence.best_step
        if self.best_weights is None:
            report.notes.append(f"the trained model is of step {best}, outside of what was replayed")
            return
        model, weights = self.evidence.model, self.best_weights
        if model is None:
            report.differ(best, f"the trained model does not verify: {self.evidence.model_damage}")
            return
        report.model_compared = True
        unsaved = unsaved_weights(self.session.scored)
        report.weights_sha256 = self.evidence.model_sha256
        if unsaved:  # what is kept of the model is compared below, tensor by tensor
            report.weights_sha256 = self.collectives.on_rank_zero(lambda: weights_sha256({**weights, **unsaved}))
        name = self.collectives.on_rank_zero(lambda: first_different_tensor(model, {"model.pth": weights}))
        if name:
            report.differ(best, f"the trained model's {name} is not what the replay has")
        if not self._same_task(model):
            report.differ(best, "the trained model's task (fitted preprocessing) is not what the replay has")
        described = describe_model(self.session.config, self.session.task.class_names)
        expected = config_from_tree(described["config"], "config.yaml")
        if config_of_model(model, DESCRIPTION) != expected:
            report.differ(best, f"the trained model's {DESCRIPTION} is not of the run's configuration")
        if report.weights_sha256 != summary["weights_sha256"]:
            report.differ(best, "model/model.pth does not have the weights_sha256 of summary.json")
        self.session.scored.load_state_dict(self.collectives.tensors_of_rank_zero(weights))
        scores, calibration = score_splits(
            self.session.scored, self.session.task, self.session.config, self.collectives
        )
        if model.get(CALIBRATION) != json.loads(json.dumps(calibration)):
            report.differ(best, f"the trained model's {CALIBRATION} is not what the replay has")
        for split, score in scores.items():
            redefined = self._redefined(model[DESCRIPTION]["format"])
            name = first_difference(summary[split] or {}, json.loads(json.dumps(score)) or {}, redefined)
            if name:
                report.differ(best, f"the summary's {split} {name} is not what the replayed weights have")

    def _redefined(self, number: int) -> dict[str, str]:
        """Metrics that cannot be compared with those of artefacts of this format; the report says so, once."""
        redefined = redefined_metrics(number, len(self.session.task.class_names))
        for name, words in redefined.items():
            note = f"{name} is not compared: its definition has changed since the run was trained; {words}"
            if note not in self.report.notes:
                self.report.notes.append(note)
        return redefined

    def _same_task(self, parts: Parts) -> bool:
        """Whether the task in a checkpoint or in `model/` is that of the replay; its format may be an older one."""
        return self.session.task.matches(description_in(parts))


def first_difference(
    recorded: Mapping[str, Any], replayed: Mapping[str, Any], redefined: Mapping[str, str] | None = None
) -> str | None:
    for name in [*replayed, *recorded]:
        if name not in OF_THE_CLOCK and name not in (redefined or {}) and recorded.get(name) != replayed.get(name):
            return name
    return None


def first_different_tensor(recorded: Parts, replayed: Parts) -> str | None:
    """Part and name of a tensor that only one has, or that differs; `recorded` comes of `with_digests`."""
    for part, tensors in replayed.items():
        theirs: Mapping[str, str] = recorded.get(part, {})
        for name in [*tensors, *theirs]:
            if name not in theirs or name not in tensors or theirs[name] != tensor_sha256(tensors[name]):
                return f"{part}, tensor {name}"
    return None
