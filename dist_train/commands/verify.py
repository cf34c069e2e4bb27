"""Replay a run from its checkpoints and compare every bit: for a model validator.

    dist-train verify runs/credit_risk                      # all of it, from the initial weights, on one process
    dist-train verify runs/credit_risk --steps 500:1000     # from the checkpoint at or before step 500
    dist-train verify runs/credit_risk --challenge 5        # five random windows between checkpoints
    dist-train verify runs/credit_risk --public-key public.pem
    torchrun --standalone --nproc_per_node=4 -m dist_train verify runs/credit_risk

A run in the exact mode (train.virtual_ranks=V) is replayed on any number of ranks that divides V. A run in the fast
mode is replayed on as many ranks as it was trained on. Of an ensemble each member is replayed, and their mean is made
again. The run may be finished or still running; nothing in its folder is changed. The data are read from the path in
the run's configuration, relative to the current folder.
Before the replay the folder is compared with its witness.jsonl, a hash chain of the states; of a run that an earlier
version has trained there is none. A challenge replays K windows, each from the checkpoint at its start to the next one
that exists (checkpoint.keep), and says with which probability one altered window is found. Of an ensemble they are
drawn from the windows of all members.
--public-key checks the signature of model/ before anything else.
A report goes to stderr, one line of JSON to stdout. Exit code 0: all agree; 1: the first step that differs is named.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dist_train.accel.host_memory import use_host_memory
from dist_train.commands.parser import command_parser, path
from dist_train.errors import TrainingFault, UserError
from dist_train.system.console import log, print_json

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from dist_train.run.verification.challenge import Challenge, MemberWindow, Window
    from dist_train.run.verification.ensemble_verification import EnsembleReport
    from dist_train.run.verification.replay import Report


def main(program: str, argv: Sequence[str]) -> None:
    """Parse the arguments and run the command."""
    parser = command_parser(program, __doc__)
    parser.add_argument("run_dir", type=path, help="run folder, e.g. runs/credit_risk")
    parser.add_argument("--steps", default="0:", help="A:B, replay the steps after A up to B (default: all)")
    parser.add_argument("--challenge", type=int, metavar="K", help="replay K random windows between checkpoints")
    parser.add_argument("--challenge-seed", type=int, metavar="SEED", help="draws the windows (default: a random one)")
    parser.add_argument("--public-key", type=path, metavar="FILE", help="check first that `sign` has signed model/")
    arguments = parser.parse_args(argv)
    first, last = _range(arguments.steps)
    _check_challenge(arguments)

    from dist_train.config.members import is_ensemble
    from dist_train.distributed.collectives import Collectives
    from dist_train.distributed.supervision import watched
    from dist_train.distributed.world import device_here, process_group, world_from_environment
    from dist_train.run.checkpoint.run_folder import opened_run
    from dist_train.run.verification.ensemble_verification import challenge_ensemble, verify_ensemble
    from dist_train.run.verification.run_verification import challenge, verify
    from dist_train.system.machine import pin_arithmetic

    folder, config = opened_run(arguments.run_dir)
    whole = is_ensemble(config)
    if whole and (first, last) != (0, None):
        raise UserError(f"--steps: {folder.path} is an ensemble: the steps are those of a member, a folder in it")
    signed_by = _signed_by(folder.model, arguments.public_key)
    world = world_from_environment(os.environ, device=device_here(config.runtime.device))
    if config.train.virtual_ranks:
        pin_arithmetic(world.device)
    timeout = config.runtime.timeout_seconds
    with process_group(world, timeout) as store:
        collectives = use_host_memory(Collectives(world))
        with watched(collectives, store, timeout_seconds=timeout, report_file=None):
            if whole and arguments.challenge:
                of_members = challenge_ensemble(
                    folder, config, collectives, arguments.challenge, arguments.challenge_seed
                )
            elif whole:
                of_members = verify_ensemble(folder, config, collectives)
            elif arguments.challenge:
                report = challenge(folder, config, collectives, arguments.challenge, arguments.challenge_seed)
            else:
                report = verify(folder, config, collectives, first, last)
    if whole:
        of_members.signed_by = signed_by
        _end_of_ensemble(of_members, world.rank)
    else:
        report.signed_by = signed_by
        _end_of_run(report, world.rank)


def _check_challenge(arguments: Namespace) -> None:
    if arguments.challenge is None:
        if arguments.challenge_seed is not None:
            raise UserError("--challenge-seed: draws the windows of --challenge K: give that too")
        return
    if arguments.challenge < 1:
        raise UserError(f"--challenge {arguments.challenge}: must be at least 1 window")
    if arguments.steps != "0:":
        raise UserError("--challenge: draws windows of the whole run: leave --steps out")


def _signed_by(model: Path, public_key: Path | None) -> str:
    """SHA-256 of the public key that has signed the model; an empty text: nobody asks."""
    if public_key is None:
        return ""
    from dist_train.run.checkpoint.signature import check_signature

    digest = check_signature(model, public_key)
    log.info("every file of %s is signed with the key of SHA-256 %s", model, digest)
    return digest


def _end_of_run(report: Report, rank: int) -> None:
    if rank == 0:
        _show(report)
        print_json(asdict(report))
    if report.difference is not None:
        raise TrainingFault(f"step {report.difference_step} differs: {report.difference}")


def _end_of_ensemble(report: EnsembleReport, rank: int) -> None:
    if rank == 0:
        for name, of_member in report.members.items():
            log.info("member %s", name)
            _show(of_member)
        if report.challenge:
            _show_challenge(report.challenge)
        if report.difference is None and report.model_compared:
            log.info("the mean of %d members, sha256 %s, agrees to the bit", len(report.members), report.weights_sha256)
        print_json(asdict(report))
    if report.difference is not None:
        raise TrainingFault(report.difference)


def _range(text: str) -> tuple[int, int | None]:
    first, colon, last = text.partition(":")
    if not colon or not (first or "0").isdecimal() or not (last or "0").isdecimal():
        raise UserError(f"--steps {text}: must be A:B, e.g. 500:1000")
    return int(first or 0), int(last) if last else None


def _show(report: Report) -> None:
    if report.witness_lines:
        log.info("witness.jsonl has %d lines, head %s", report.witness_lines, report.witness_head)
    if report.challenge:
        _show_challenge(report.challenge)
    elif report.last_step > report.first_step:
        log.info("replayed the steps %d to %d on %s", report.first_step + 1, report.last_step, report.machine["device"])
    if report.data_sha256:
        log.info("processor %s, torch %s", report.machine["processor"], report.machine["torch"])
        log.info("data sha256 %s", report.data_sha256)
    if report.weights_sha256:
        log.info("weights sha256 %s", report.weights_sha256)
    for note in report.notes:
        log.warning("%s", note)
    if report.difference is None:
        model = ", and the trained model and its metrics" if report.model_compared else ""
        states = f", {report.states} states of removed ones" if report.states else ""
        log.info(
            "%d lines of metrics and %d checkpoints%s%s agree to the bit",
            report.lines, report.checkpoints, states, model,
        )  # fmt: skip
        here, there = _processor(report.machine), _processor(report.trained_on)
        if report.trained_on and here != there:
            log.info("the same bits were computed on %s and on %s", there, here)


def _show_challenge(challenge: Challenge[Any]) -> None:
    listed = ", ".join(map(_named, challenge.drawn))
    drawn = f"{len(challenge.drawn)} of {challenge.windows} windows, {challenge.steps} steps: {listed}"
    log.info("replayed %s (--challenge-seed %d)", drawn, challenge.seed)
    log.info("one altered window of %d is found with probability %.4g", challenge.windows, challenge.probability)
    for window in challenge.differing:
        log.warning("the window %s differs", _named(window))


def _named(window: Window | MemberWindow) -> str:
    *member, start, end = window
    return " ".join([*map(str, member), f"{start}:{end}"])


def _processor(machine: Mapping[str, str]) -> str:
    return f"{machine.get('processor')} ({machine.get('instructions', machine.get('device'))})"
