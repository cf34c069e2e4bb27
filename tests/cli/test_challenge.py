"""`verify --challenge K` replays K windows of a run, and finds an altered one as often as the arithmetic says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.load import load_config
from dist_train.distributed.world import World
from dist_train.run.checkpoint.commit import commit
from dist_train.run.checkpoint.state import encode_parts, read_parts
from dist_train.run.job import train
from dist_train.run.verification.challenge import detection_probability, draw
from dist_train.tasks.registry import load_task
from tests.cli.in_process import CommandResult, command, command_on_ranks
from tests.resume.jobs import folder_of, tiny_job, write_table
from tests.run.forging import forge_chain

STEPS = 40
EXACT = (
    "train.virtual_ranks=2", f"train.max_steps={STEPS}", "checkpoint.keep=99", "checkpoint.every_steps=4",
    "train.early_stopping_patience=null", "evaluation.every_steps=8", "data.split_column=split", "data.drop=[region]",
)  # fmt: skip


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints are all there; its rows say themselves in which split they are."""
    folder = tmp_path_factory.mktemp("honest")
    table = write_table(folder / "clients.csv", rows=900)
    header, *rows = table.read_text().splitlines()
    splits = ["valid" if number % 9 == 0 else "test" if number % 9 == 1 else "train" for number in range(len(rows))]
    lines = [f"{header},split", *(f"{row},{split}" for row, split in zip(rows, splits, strict=True))]
    table.write_text("\n".join(lines) + "\n")
    arguments = tiny_job(table, folder / "run", *EXACT)
    assert train(load_config(arguments), World(), {})
    return folder_of(arguments)


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    """The run, to be altered; its table lies beside it."""
    return _copied(honest, tmp_path / "copy")


def _copied(run_dir: Path, to: Path) -> Path:
    shutil.copytree(run_dir.parent, to)
    config = to / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(run_dir.parent), str(to)))
    return to / "run"


def _challenge(run_dir: Path, count: int, *more: Any) -> tuple[CommandResult, dict[str, Any]]:
    seen = command("verify", run_dir, "--challenge", count, *more)
    return seen, json.loads(seen.out)


def test_an_honest_run_is_believed_and_the_seed_draws_the_same_windows_again(honest: Path) -> None:
    seen, report = _challenge(honest, 3)
    assert seen.code == 0, seen.err
    found = report["challenge"]
    assert (found["windows"], len(found["drawn"]), found["probability"]) == (10, 3, pytest.approx(0.3))
    assert report["checkpoints"] == 3
    assert report["lines"] > 3
    assert f"(--challenge-seed {found['seed']})" in seen.err
    assert "one altered window of 10 is found with probability 0.3" in seen.err
    again = _challenge(honest, 3, "--challenge-seed", found["seed"])[1]
    assert again["challenge"] == found


def test_all_windows_confirm_all_that_a_replay_of_the_whole_does(honest: Path) -> None:
    whole = json.loads(command("verify", honest).out)
    report = _challenge(honest, 99)[1]
    names = ("lines", "checkpoints", "model_compared", "weights_sha256", "difference", "notes", "witness_head")
    assert {name: report[name] for name in names} == {name: whole[name] for name in names}
    assert report["model_compared"]


def test_on_another_world_size(honest: Path) -> None:
    done = command_on_ranks(2, "verify", honest, "--challenge", "2")
    assert [rank.code for rank in done] == [0, 0], done
    assert json.loads(done[0].out)["challenge"]["differing"] == []


def test_states_of_removed_checkpoints_are_compared_with_the_chain(copy: Path) -> None:
    for step in (8, 12, 24):
        shutil.rmtree(copy / "checkpoints" / f"step_{step:08d}")
    seen, report = _challenge(copy, 99)
    assert seen.code == 0, seen.err
    assert [4, 16] in report["challenge"]["drawn"]
    assert report["challenge"]["windows"] == 7
    assert report["states"] == 3
    assert "7 checkpoints, 3 states of removed ones" in seen.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--challenge", "0"), "--challenge 0: must be at least 1 window"),
        (("--challenge-seed", "3"), "--challenge-seed: draws the windows of --challenge K: give that too"),
        (("--challenge", "2", "--steps", "4:8"), "--challenge: draws windows of the whole run: leave --steps out"),
    ],
)
def test_what_makes_no_sense_is_one_line(honest: Path, arguments: tuple[str, ...], said: str) -> None:
    seen = command("verify", honest, *arguments)
    assert (seen.code, seen.err) == (2, f"error: {said}\n")


# Alterations of a forger who hashes everything anew: manifests, the chain, the head in the model.


def tensor(part: str, step: int) -> Callable[[Path], None]:
    """The last bit of one number of a part of a checkpoint."""

    def alter(run_dir: Path) -> None:
        checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
        parts = read_parts(checkpoint)
        name = max(parts[part], key=lambda name: parts[part][name].numel() * parts[part][name].is_floating_point())
        values = parts[part][name].view(-1)
        values[0] = values[0] * (1 + 2**-22) + 2**-40
        commit(checkpoint, encode_parts(parts))

    return alter


def line(step: int, split: str, name: str) -> Callable[[Path], None]:
    """The last bits of one number of a line of metrics."""

    def alter(run_dir: Path) -> None:
        file = run_dir / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        found = next(record for record in records if record["step"] >= step and record["split"] == split)
        found[name] = found[name] * (1 + 2**-40)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    return alter


def row(split: str, number: int) -> Callable[[Path], None]:
    """The class of one row of the data, and the hash of the data everywhere in the folder."""

    def alter(run_dir: Path) -> None:
        table = run_dir.parent / "clients.csv"
        lines = table.read_text().splitlines()
        of_split = [place for place, text in enumerate(lines) if text.endswith(f",{split}")]
        cells = lines[of_split[number]].split(",")
        cells[3] = "low" if cells[3] != "low" else "high"
        lines[of_split[number]] = ",".join(cells)
        table.write_text("\n".join(lines) + "\n")
        arguments = tiny_job(table, run_dir, *EXACT)
        fingerprint = load_task(load_config(arguments), _alone()).fingerprint
        for folder in [*(run_dir / "checkpoints").iterdir(), run_dir / "model"]:
            parts = read_parts(folder)
            described = parts["model.json" if folder.name == "model" else "state.json"]
            described["data_sha256"] = fingerprint
            commit(folder, encode_parts(parts))
        summary = json.loads((run_dir / "summary.json").read_text()) | {"data_sha256": fingerprint}
        (run_dir / "summary.json").write_text(json.dumps(summary))

    return alter


def _alone() -> Any:
    from dist_train.distributed.collectives import Collectives

    return Collectives(World())


CASES = {
    **{
        f"{part} of step {step}": tensor(part, step)
        for part, step in [
            ("model.pth", 8), ("model.pth", 20), ("model.pth", 36), ("optimizer.pth", 4), ("optimizer.pth", 16),
            ("optimizer.pth", 28), ("average.pth", 12), ("average.pth", 24), ("meter.pth", 8),
        ]
    },
    **{
        f"{name} of the {split} line of step {step}": line(step, split, name)
        for step, split, name in [
            (3, "train", "loss"), (15, "train", "grad_norm"), (21, "train", "learning_rate"), (33, "train", "loss"),
            (8, "valid", "loss"), (16, "valid", "accuracy"), (40, "valid", "macro_f1"),
        ]
    },
    "train row 5": row("train", 5),
    "train row 300": row("train", 300),
    "train row 650": row("train", 650),
    "valid row 40": row("valid", 40),
}  # fmt: skip


def test_an_alteration_that_is_hashed_anew_is_found_by_its_window(copy: Path) -> None:
    tensor("optimizer.pth", 16)(copy)
    forge_chain(copy)
    seen, report = _challenge(copy, 10)
    assert seen.code == 1
    assert seen.err.splitlines()[-1].startswith("error: step 16 differs: the checkpoint's optimizer.pth, tensor")
    assert report["challenge"]["differing"] == [[12, 16], [16, 20]]
    without = next(s for s in range(99) if not {(12, 16), (16, 20)} & {*draw(_windows(), 3, s)})
    assert _challenge(copy, 3, "--challenge-seed", without)[0].code == 0


def _windows() -> list[tuple[int, int]]:
    return [(start, start + 4) for start in range(0, STEPS, 4)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_alterations_are_found_as_often_as_is_said(honest: Path, tmp_path: Path) -> None:
    """Each by a challenge of all windows; with K = 1, 3 and 6 as often as the hypergeometric distribution says."""
    assert len(CASES) == 20
    challenges, found, expected, variance = 0, 0, 0.0, 0.0
    for number, (name, alter) in enumerate(CASES.items()):
        run_dir = _copied(honest, tmp_path / str(number))
        alter(run_dir)
        forge_chain(run_dir)
        seen, report = _challenge(run_dir, 10)
        assert seen.code == 1, name
        altered = {tuple(window) for window in report["challenge"]["differing"]}
        assert altered, name
        print(f"{name}: {len(altered)} of 10 windows differ; {seen.err.splitlines()[-1]}")
        for count in (1, 3, 6):
            probability = detection_probability(10, len(altered), count)
            for seed in range(4):
                seed += 100 * number + 10 * count
                seen, report = _challenge(run_dir, count, "--challenge-seed", seed)
                assert seen.code == bool(altered & {*draw(_windows(), count, seed)}), (name, seed)
                challenges, found = challenges + 1, found + seen.code
                expected, variance = expected + probability, variance + probability * (1 - probability)
    print(f"{challenges} challenges, {found} found, {expected:.1f} expected, standard deviation {sqrt(variance):.1f}")
    assert abs(found - expected) <= 4 * sqrt(variance)
