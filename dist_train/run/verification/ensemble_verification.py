"""Replay the members of an ensemble, or windows of them, and make of them again what the ensemble claims to be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dist_train.config.members import MemberRun, members_of
from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.errors import TrainingFault
from dist_train.run.checkpoint.commit import CorruptCheckpoint
from dist_train.run.checkpoint.run_folder import RunFolder, opened_run
from dist_train.run.checkpoint.state import Parts, with_digests
from dist_train.run.checkpoint.trained_model import CALIBRATION, ENSEMBLE, config_of_model, read_trained_model
from dist_train.run.ensemble import OUT_OF_FOLD, Scores, parts_of_member, scores_of_members
from dist_train.run.scoring.members import ensemble_parts
from dist_train.run.verification.challenge import Challenge, MemberWindow
from dist_train.run.verification.replay import Report, first_difference, first_different_tensor
from dist_train.run.verification.run_verification import ChallengedRun, seed_of_challenge, verify
from dist_train.system.console import log

_MADE_OF_MEMBERS = ("members", "data_sha256", "weights_sha256")


@dataclass
class EnsembleReport:
    """What the replays found. `difference` is None when everything agreed; `members` are those that were replayed.

    `challenge`: windows of members were replayed, not all their steps.
    `model_compared`: the trained model, its metrics and the predictions out of fold were made again.
    """

    members: dict[str, Report]
    challenge: Challenge[MemberWindow] | None = None
    model_compared: bool = False
    weights_sha256: str = ""
    signed_by: str = ""
    difference: str | None = None


def verify_ensemble(folder: RunFolder, config: JobConfig, collectives: Collectives) -> EnsembleReport:
    """Replay each member from its initial weights, then compare the whole; ends at the first difference.

    Of the whole these are made again from the members' trained models: `model/`, the metrics of `valid` and `test` in
    the summary, and the predictions out of fold. The same report on every rank.

    Raises:
        UserError: a member's folder is missing, or a member cannot be replayed here.
    """
    report = EnsembleReport({})
    members = members_of(config)
    for member in members:
        path = folder.path / member.name
        log.info("member %s, in %s", member.name, path)
        of_member, saved = opened_run(path)
        if _noted(report, member.name, verify(of_member, saved, collectives)):
            return report
    _compare_whole(folder, config, members, collectives, report)
    return report


def challenge_ensemble(
    folder: RunFolder, config: JobConfig, collectives: Collectives, count: int, seed: int | None
) -> EnsembleReport:
    """Replay `count` windows, drawn from those of all members, each in its member; then compare the whole.

    All of them are replayed, also after a difference. The whole is compared as by `verify_ensemble`, which says what is
    raised.
    """
    report = EnsembleReport({})
    members, runs = members_of(config), {}
    for member in members:
        runs[member.name] = ChallengedRun(*opened_run(folder.path / member.name), collectives)
        if _noted(report, member.name, runs[member.name].report):
            return report
    windows = [(name, *window) for name, run in runs.items() for window in run.windows]
    report.challenge = Challenge.of(windows, count, seed_of_challenge(seed, collectives))
    for name, run in runs.items():
        drawn = [(start, end) for member, start, end in report.challenge.drawn if member == name]
        if drawn:
            log.info("member %s, %d windows", name, len(drawn))
            report.challenge.differing += [(name, *window) for window in run.replay(drawn)]
            _noted(report, name, run.report)
    if report.difference is None:
        _compare_whole(folder, config, members, collectives, report)
    return report


def _noted(report: EnsembleReport, name: str, of_member: Report) -> bool:
    """Take over what was found of a member; whether it differs."""
    report.members[name] = of_member
    if of_member.difference is not None and report.difference is None:
        report.difference = f"member {name}, step {of_member.difference_step}: {of_member.difference}"
    return of_member.difference is not None


def _compare_whole(
    folder: RunFolder,
    config: JobConfig,
    members: Sequence[MemberRun],
    collectives: Collectives,
    report: EnsembleReport,
) -> None:
    """Make the whole again of the members' trained models, where the ensemble is finished."""
    if not collectives.on_rank_zero(folder.summary.is_file):
        return
    try:
        parts = [collectives.on_rank_zero(partial(parts_of_member, folder, member)) for member in members]
    except TrainingFault as damage:
        report.difference = str(damage)
        return
    scores = scores_of_members(config, members, parts, collectives)
    report.weights_sha256, report.difference = collectives.on_rank_zero(
        lambda: _compared(folder, config, members, parts, scores)
    )
    report.model_compared = True


def _compared(
    folder: RunFolder, config: JobConfig, members: Sequence[MemberRun], parts: Sequence[Parts], scores: Scores
) -> tuple[str, str | None]:
    """SHA-256 of the weights that the members give, and the first thing that is not what the folder has."""
    expected = ensemble_parts(config, [member.name for member in members], parts)
    digest = expected[ENSEMBLE]["weights_sha256"]
    try:
        model = read_trained_model(folder.model)
    except CorruptCheckpoint as damage:
        return digest, f"the trained model does not verify: {damage}"
    summary = json.loads(folder.summary.read_bytes())
    tensor = first_different_tensor(with_digests(model), {"model.pth": expected["model.pth"]})
    if tensor:
        return digest, f"the trained model's {tensor} is not that of the members"
    described, of_members = model[ENSEMBLE], expected[ENSEMBLE]
    name = next((name for name in _MADE_OF_MEMBERS if described[name] != of_members[name]), None)
    if name or config_of_model(model, ENSEMBLE) != config_of_model(expected, ENSEMBLE):
        return digest, f"the trained model's {ENSEMBLE}: {name or 'config'} is not that of the members"
    if summary["weights_sha256"] != digest:
        return digest, "the summary's weights_sha256 is not that of the members"
    if model.get(CALIBRATION) != json.loads(json.dumps(scores.calibration)):
        return digest, f"the trained model's {CALIBRATION} is not fitted to what the members predict"
    for split, metrics in json.loads(json.dumps(scores.metrics)).items():
        name = first_difference(summary[split] or {}, metrics or {})
        if name:
            return digest, f"the summary's {split} {name} is not what the members have"
    return digest, _out_of_fold(folder.path / OUT_OF_FOLD, scores.out_of_fold)


def _out_of_fold(file: Path, expected: bytes | None) -> str | None:
    if expected is None:
        return None
    same = file.is_file() and file.read_bytes() == expected
    return None if same else f"{file.name} is not what the members predict"
