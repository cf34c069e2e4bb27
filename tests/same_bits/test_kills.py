"""Kills and world sizes together: each restart on another world size, and the end is the uninterrupted run's bits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.resume.jobs import Trap, finish, folder_of, outcome, run_job, tiny_job, write_table
from tests.same_bits.test_world_sizes import default_job

NUM_KILLS = 100
WORLDS = (1, 2, 3, 4, 6)


def test_every_restart_on_another_world_size(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    whole = finish(tiny_job(table, tmp_path / "whole", "train.virtual_ranks=12"), 1)
    arguments = tiny_job(table, tmp_path / "killed", "train.virtual_ranks=12")
    for world, trap in [
        (3, Trap(step=4)),
        (2, Trap(save=2, kind="fsync", nth=3, tear=True)),
        (1, Trap(step=17)),  # in the middle of an epoch and of a line of metrics
        (4, Trap(save=1, kind="os.rename")),
        (2, Trap(step=33)),
    ]:
        assert run_job(arguments, world, trap).killed, trap
    assert finish(arguments, 3) == whole


def test_a_finished_run_does_not_change_on_another_world_size(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    arguments = tiny_job(table, tmp_path / "run", "train.virtual_ranks=6", "train.max_steps=20")
    assert finish(arguments, 2) == finish(arguments, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_at_random_on_random_world_sizes(tmp_path: Path) -> None:
    """The default job, V = 12: killed at a random step or file operation of a save, gone on with on a random world."""
    draw = random.Random(2024)
    more = ["train.epochs=8", "train.global_batch_size=250", "checkpoint.every_steps=3", "checkpoint.keep=3"]
    whole = finish([*default_job(tmp_path / "whole", 12), *more], 2)
    arguments = [*default_job(tmp_path / "killed", 12), *more]
    worlds: dict[int, int] = {}
    kills, step = 0, 0
    while kills < NUM_KILLS:
        world = draw.choice(WORLDS)
        ahead = draw.randint(0, 8)
        trap = (
            Trap(step=min(step + ahead, whole["steps"] - 2))
            if draw.random() < 0.5
            else Trap(save=draw.randint(1, 2), nth=draw.randint(1, 24), tear=True)
        )
        ended = run_job(arguments, world, trap)
        assert ended.killed, (kills, trap, ended.errors)
        kills += 1
        worlds[world] = worlds.get(world, 0) + 1
        saved = [int(p.name[5:]) for p in (folder_of(arguments) / "checkpoints").glob("step_*")]
        step = max(saved, default=0)
    assert not (folder_of(arguments) / "summary.json").exists()
    run_job(arguments, 3)
    assert outcome(folder_of(arguments)) == whole
    print(f"{kills} kills, restarts on {worlds}; {whole['steps']} steps, {whole['weights_sha256']}")
