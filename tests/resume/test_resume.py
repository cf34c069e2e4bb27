"""What a resumed run accepts, refuses, skips and leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config.load import load_config
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.checkpoint import checkpoints as checkpoints_module
from dist_train.run.checkpoint.commit import MANIFEST, commit, read_verified
from dist_train.run.checkpoint.lock import RunLock, this_process
from dist_train.run.checkpoint.state import read_parts, weights_sha256
from dist_train.run.resume import _regrouped
from dist_train.run.session import scored_weights
from tests.cli.in_process import CommandResult, command
from tests.resume.jobs import Ended, Trap, finish, outcome, run_job, tiny_job
from tests.run.checkpoint.test_state import Intruder

STEPS = 33
STOP = 23  # neither a multiple of what is saved nor of what is logged, nor just after an evaluation


def _files(folder: Path) -> dict[str, str]:
    """Content of every file of a run folder but the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture(scope="module")
def runs(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole`: a finished run of STEPS steps. `part`: the same run, stopped after STOP steps."""
    folder = tmp_path_factory.mktemp("runs")
    for name, steps in (("whole", STEPS), ("part", STOP)):
        trap = None if name == "whole" else Trap(step=STOP - 2, signal=15)
        ended = run_job(tiny_job(table, folder / name, f"train.max_steps={STEPS}"), 1, trap)
        assert ended.codes == [0], (steps, ended.errors)
    assert (folder / "part" / "requeue").exists()
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As the runs that are continued were computed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def part(runs: Path, tmp_path: Path) -> Path:
    """A stopped run of one's own."""
    return Path(shutil.copytree(runs / "part", tmp_path / "run"))


@pytest.fixture
def go_on(table: Path, tmp_path: Path) -> Callable[..., Any]:
    """The same command again, with more arguments."""
    return lambda *more: command("train", *tiny_job(table, tmp_path / "run", f"train.max_steps={STEPS}", *more))


def _newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"))


HARMFUL = {
    "run.seed=1": "run.seed: was 0, is 1",
    "data.drop=[region]": "data.drop: was [], is ['region']",
    "data.max_categories=2": "data.max_categories: was 256, is 2",
    "data.test_fraction=0.2": "data.test_fraction: was 0.15, is 0.2",
    "model.hidden_dim=8": "model.hidden_dim: was 16, is 8",
    "model.dropout=0.1": "model.dropout: was [0.3, 0.2], is 0.1",
    "model.embedding_dim=2": "model.embedding_dim: was None, is 2",
    "optim.lr=0.01": "optim.lr: was 0.05, is 0.01",
    "optim.betas=[0.8,0.99]": "optim.betas: was [0.9, 0.999], is [0.8, 0.99]",
    "optim.max_grad_norm=null": "optim.max_grad_norm: was 1.0, is None",
    "schedule.warmup_steps=6": "schedule.warmup_steps: was 5, is 6",
    "train.global_batch_size=20": "train.global_batch_size: was 16, is 20",
    "train.accumulation_steps=1": "train.accumulation_steps: was 2, is 1",
    "train.precision=float64": "train.precision: was 'float32', is 'float64'",
    "train.class_weights=balanced": "train.class_weights: was None, is 'balanced'",
    "train.label_smoothing=0.1": "train.label_smoothing: was 0.0, is 0.1",
    "train.ema_decay=null": "train.ema_decay: was 0.9, is None",
}


@pytest.mark.parametrize("change", HARMFUL)
def test_a_change_of_what_a_step_computes_is_refused(part: Path, go_on: Callable[..., Any], change: str) -> None:
    before = _files(part)
    done = go_on(change)
    assert done.code == 2
    assert f"the checkpoint of step {STOP} was trained with another configuration: {HARMFUL[change]}." in done.err
    assert done.err.count("error:") == 1
    assert _files(part) == before


@pytest.mark.usefixtures("part")
def test_all_differences_are_named_at_once(go_on: Callable[..., Any]) -> None:
    changes = ["run.seed=1", "optim.lr=0.01", "train.label_smoothing=0.1"]
    done = go_on(*changes, "log.every_steps=7")
    assert done.code == 2
    assert (
        "; ".join(HARMFUL[change] for change in sorted(changes, key=HARMFUL.__getitem__)) in done.err.splitlines()[-1]
    )
    assert "log.every_steps" not in done.err.splitlines()[-1]


def test_harmless_changes_are_accepted(runs: Path, part: Path, go_on: Callable[..., Any]) -> None:
    done = go_on("log.every_steps=4", "checkpoint.keep=1", "evaluation.batch_size=9", "runtime.timeout_seconds=20")
    assert done.code == 0, done.err
    assert "changed since the checkpoint: log.every_steps: was 3, is 4" in done.err
    assert outcome(part)["weights_sha256"] == outcome(runs / "whole")["weights_sha256"]


def test_a_change_can_be_forced(part: Path, go_on: Callable[..., Any]) -> None:
    done = go_on("optim.lr=0.01", "run.force=true")
    assert done.code == 0, done.err
    assert "forced to go on although optim.lr: was 0.05, is 0.01" in done.err
    assert outcome(part)["steps"] == STEPS
    # The next resume compares with what the run goes on with now.
    assert go_on("optim.lr=0.01").code == 0


def test_who_insisted_once_has_not_insisted_for_good(part: Path) -> None:
    def again(*more: object) -> CommandResult:
        return command("train", part / "config.yaml", f"run.dir={part.parent}", f"run.name={part.name}", *more)

    done = again("optim.lr=0.01", "run.force=true")
    assert done.code == 0, done.err
    before = _files(part)
    done = again("optim.lr=0.02")
    assert done.code == 2, done.err
    assert "optim.lr: was 0.01, is 0.02" in done.err
    assert _files(part) == before


def test_what_cannot_be_forced_is_a_mistake_and_no_traceback(part: Path, go_on: Callable[..., Any]) -> None:
    before = _files(part)
    done = go_on("model.hidden_dim=8", "run.force=true")
    assert done.code == 2
    assert "does not fit this model" in done.err
    assert "Traceback" not in done.err
    assert _files(part) == before


def test_changed_data_are_refused_and_moved_data_are_not(
    runs: Path, part: Path, go_on: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    before = _files(part)
    changed = tmp_path / "changed.csv"
    changed.write_text(table.read_text() + "1.0,2.0,north,low\n")
    done = go_on(f"data.path={changed}")
    assert done.code == 2
    assert f"{changed}: the file has changed since the checkpoint of step {STOP}" in done.err
    assert _files(part) == before

    moved = Path(shutil.copy(table, tmp_path / "moved.csv"))
    assert go_on(f"data.path={moved}").code == 0
    assert outcome(part) == outcome(runs / "whole")


def test_changed_data_can_be_forced_and_keep_the_encoder(
    part: Path, go_on: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.csv"
    changed.write_text(table.read_text() + "1.0,2.0,north,low\n900.0,2.0,east,low\n")
    done = go_on(f"data.path={changed}", "run.force=true")
    assert done.code == 0, done.err
    assert "forced to go on although the data have changed" in done.err
    encoder = (part / "model" / "task.json").read_text()
    assert "east" not in encoder


def test_weights_of_classes_named_by_numbers_are_no_difference(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("x,y\n" + "".join(f"{i % 7},{i % 2}\n" for i in range(60)))
    arguments = [
        f"data.path={table}", "data.target=y", f"run.dir={tmp_path}", "run.name=run", "wandb.mode=disabled",
        "runtime.device=cpu", "model.hidden_dim=4", "train.class_weights={0: 1.0, 1: 2.0}", "train.epochs=2",
    ]  # fmt: skip
    assert command("train", *arguments).code == 0
    done = command("train", *arguments)
    assert done.code == 0, done.err


def test_never_moves_the_old_run_aside_and_starts_anew(
    runs: Path, part: Path, go_on: Callable[..., Any], tmp_path: Path
) -> None:
    before = _files(part)
    done = go_on("run.resume=never")
    assert done.code == 0, done.err
    assert _files(tmp_path / "run.old-1") == before
    assert outcome(part) == outcome(runs / "whole")
    assert go_on("run.resume=never").code == 0
    assert _files(tmp_path / "run.old-1") == before
    assert outcome(tmp_path / "run.old-2") == outcome(runs / "whole")


def _snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Time of the last change and content of everything in a run folder, the folder itself and its lock included."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *sorted(folder.rglob("*"))]
    }


def test_a_command_on_a_finished_run_touches_nothing(runs: Path, go_on: Callable[..., Any], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    before = _snapshot(run_dir)
    done = go_on("wandb.mode=offline", "log.every_steps=4")
    assert done.code == 0, done.err
    (line,) = done.err.splitlines()
    loss = outcome(run_dir)["test"]["loss"]
    assert f"{run_dir}: the run is finished after {STEPS} steps: test loss {loss:.4f}  auroc " in line
    assert f"continue with a larger train.max_steps (now {STEPS}), or start anew with run.resume=never" in line
    assert _snapshot(run_dir) == before
    assert go_on("train.epochs=900", "run.force=true").code == 0
    assert _snapshot(run_dir) == before

    done = go_on("optim.lr=0.01")
    assert done.code == 2
    assert "trained with another configuration: optim.lr: was 0.05, is 0.01." in done.err
    assert len(done.err.splitlines()) == 1
    assert _snapshot(run_dir) == before


def test_a_finished_run_does_not_ask_for_another_start(runs: Path, go_on: Callable[..., Any], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    before = _snapshot(run_dir)
    (run_dir / "requeue").write_text("{}")  # of a job that was stopped while it read the data
    assert go_on().code == 0
    after = _snapshot(run_dir)
    assert (after | {str(run_dir): before[str(run_dir)]}) == before


def test_a_finished_run_of_two_ranks_is_finished_for_one(table: Path, tmp_path: Path) -> None:
    arguments = tiny_job(table, tmp_path / "run", "train.epochs=2")
    finish(arguments, 2)
    before = _snapshot(tmp_path / "run")
    done = command("train", *arguments)
    assert done.code == 0, done.err
    assert "continue with a larger train.epochs (now 2)" in done.err
    assert _snapshot(tmp_path / "run") == before


def test_a_finished_run_with_other_data_is_refused(
    runs: Path, go_on: Callable[..., Any], table: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    before = _snapshot(run_dir)
    (tmp_path / "changed.csv").write_text(table.read_text() + "1.0,2.0,north,low\n")
    done = go_on(f"data.path={tmp_path / 'changed.csv'}")
    assert done.code == 2
    assert "the file has changed since the checkpoint of step" in done.err
    assert _snapshot(run_dir) == before


@pytest.mark.parametrize("gone", ["summary.json", "model/MANIFEST.json"])
def test_a_run_that_was_killed_before_its_export_is_exported(
    runs: Path, go_on: Callable[..., Any], tmp_path: Path, gone: str
) -> None:
    run_dir = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    (run_dir / gone).unlink()
    done = go_on()
    assert done.code == 0, done.err
    first, second = (json.loads((d / "summary.json").read_text()) for d in (runs / "whole", run_dir))
    for name in ("run", "peak_memory_bytes"):  # the second process has trained nothing
        del first[name], second[name]
    assert first == second
    assert weights_sha256(read_parts(run_dir / "model")["model.pth"]) == first["weights_sha256"]


def test_more_steps_go_on(runs: Path, go_on: Callable[..., Any], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    lines = (run_dir / "metrics.jsonl").read_text()
    done = go_on(f"train.max_steps={STEPS + 9}")
    assert done.code == 0, done.err
    assert outcome(run_dir)["steps"] == STEPS + 9
    assert (run_dir / "metrics.jsonl").read_text().startswith(lines)


def _best_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    best = json.loads((run_dir / "summary.json").read_text())["best_step"]
    parts = read_parts(run_dir / "checkpoints" / f"step_{best:08d}")
    return scored_weights(parts)


def test_what_a_shorter_run_shipped_is_withdrawn_and_its_weights_stay_readable(
    runs: Path, table: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    shorter = outcome(run_dir)
    assert weights_sha256(_best_weights(run_dir)) == shorter["weights_sha256"]
    arguments = tiny_job(table, run_dir, f"train.max_steps={STEPS + 40}")
    assert run_job(arguments, 1, Trap(step=STEPS)).killed  # before its first step
    assert not (run_dir / "summary.json").exists()
    assert not (run_dir / "model").exists()
    done = command("evaluate", run_dir)
    assert done.code == 0, done.err
    # The calibration was in model/: what was made without it is compared.
    uncalibrated = {name: value for name, value in shorter["test"].items() if name != "calibrated"}
    assert json.loads(done.out)["test"] == uncalibrated
    assert finish(arguments)["steps"] > STEPS


def test_shipped_weights_that_are_nowhere_else_are_not_withdrawn(runs: Path, table: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    best = json.loads((run_dir / "summary.json").read_text())["best_step"]
    shutil.rmtree(run_dir / "checkpoints" / f"step_{best:08d}")
    before = _files(run_dir / "model")
    ended = run_job(tiny_job(table, run_dir, f"train.max_steps={STEPS + 40}"), 1, Trap(step=STEPS))
    assert ended.killed, ended.errors
    assert "its weights are nowhere else" in ended.errors[0]
    assert _files(run_dir / "model") == before
    assert (run_dir / "summary.json").exists()


def test_the_shipped_weights_are_those_of_the_summary(runs: Path) -> None:
    state = torch.load(runs / "whole" / "model" / "model.pth", weights_only=True)
    assert weights_sha256(state) == outcome(runs / "whole")["weights_sha256"]
    assert set(read_verified(runs / "whole" / "model")) == {
        "model.pth", "task.json", "model.json", "calibration.json",
    }  # fmt: skip


def _tear(folder: Path) -> None:
    os.truncate(folder / "optimizer.pth", 100)


def _flip(folder: Path) -> None:
    data = bytearray((folder / "model.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.pth").write_bytes(data)


def _lose(folder: Path) -> None:
    (folder / "state.json").unlink()


def _garble(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"garbage")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "torn": (_tear, "optimizer.pth has 100 bytes instead of"),
    "flipped": (_flip, "model.pth has another content than was written"),
    "missing": (_lose, "state.json is missing"),
    "garbage": (_garble, f"{MANIFEST} cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_skipped_and_trained_again(
    runs: Path, part: Path, go_on: Callable[..., Any], damage: str
) -> None:
    act, message = DAMAGES[damage]
    newest = _newest(part)
    act(newest)
    done = go_on()
    assert done.code == 0, done.err
    assert f"skipped a damaged checkpoint: {newest}/{message}" in done.err
    assert "resuming from the checkpoint of step 2" in done.err
    assert outcome(part) == outcome(runs / "whole")


def test_when_every_checkpoint_is_damaged_nothing_is_touched(part: Path, go_on: Callable[..., Any]) -> None:
    folders = sorted((part / "checkpoints").glob("step_*"))
    for folder in folders:
        _flip(folder)
    before = _files(part)
    done = go_on()
    assert done.code == 2
    assert "no checkpoint verifies" in done.err
    assert "run.resume=never starts anew and keeps them aside" in done.err
    assert all(f"skipped a damaged checkpoint: {folder}/model.pth" in done.err for folder in folders)
    assert "Traceback" not in done.err
    assert _files(part) == before


def test_code_in_a_checkpoint_does_not_run(runs: Path, part: Path, go_on: Callable[..., Any], tmp_path: Path) -> None:
    newest, marker = _newest(part), tmp_path / "was here"
    parts = read_verified(newest)
    torch.save({"w": Intruder(marker)}, newest / "model.pth")
    parts["model.pth"] = (newest / "model.pth").read_bytes()
    commit(newest, parts)  # sizes and digests are right
    done = go_on()
    assert done.code == 0, done.err
    assert f"skipped a damaged checkpoint: {newest}/model.pth is not a file of tensors: it holds code" in done.err
    assert not marker.exists()
    assert outcome(part) == outcome(runs / "whole")


def _damage_best(run_dir: Path) -> int:
    newest = _newest(run_dir)
    best = json.loads((newest / "state.json").read_text())["progress"]["best_step"]
    folder = run_dir / "checkpoints" / f"step_{best:08d}"
    assert folder != newest
    _flip(folder)
    return int(best)


def test_a_damaged_best_checkpoint_is_found_at_the_start_and_not_at_the_end(
    part: Path, go_on: Callable[..., Any]
) -> None:
    best = _damage_best(part)
    before = _files(part)
    done = go_on()
    assert done.code == 2
    assert f"the checkpoint of step {best} is damaged" in done.err
    assert "best weights so far" in done.err
    assert _files(part) == before

    done = go_on("run.force=true")
    assert done.code == 0, done.err
    assert "the best weights so far are lost" in done.err
    assert outcome(part)["best_step"] > best


def test_another_job_in_the_folder_is_refused(part: Path, go_on: Callable[..., Any]) -> None:
    before = _files(part)
    with RunLock(part / "lock", this_process({"SLURM_JOB_ID": "99"})):
        done = go_on()
    assert done.code == 2
    assert (
        f"another job is using this run folder: host {os.uname().nodename}, process {os.getpid()}, job 99" in done.err
    )
    assert _files(part) == before


def test_a_full_disk_is_one_line_and_loses_nothing(
    runs: Path, part: Path, go_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name for p in (part / "checkpoints").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "commit", full)
        done = go_on()
    assert done.code == 1
    assert "could not be written: [Errno 28] No space left on device; what was saved before is intact" in done.err
    assert "Traceback" not in done.err
    assert {p.name for p in (part / "checkpoints").iterdir()} == before
    assert go_on().code == 0
    assert outcome(part) == outcome(runs / "whole")


def _ended_with_one_line(ended: Ended, line: str) -> None:
    assert ended.codes == [1, 1], ended.errors
    for errors in ended.errors:
        assert "Traceback" not in errors
        assert errors.splitlines()[-1].startswith(line)


def test_metrics_that_cannot_be_opened_end_every_rank_with_one_line(table: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    ended = run_job(tiny_job(table, tmp_path / "run"), 2)
    _ended_with_one_line(ended, "error: metrics.jsonl could not be written: [Errno 21] Is a directory")


def test_another_world_size_goes_on_and_says_what_it_means(table: Path, tmp_path: Path) -> None:
    arguments = tiny_job(table, tmp_path / "run", "train.max_steps=14")
    assert run_job(arguments, 2, Trap(step=12)).killed
    ended = run_job(arguments, 1)
    assert ended.codes == [0], ended.errors
    assert "world size in the fast mode: was 2, is 1: results agree to rounding" in ended.errors[0]
    assert outcome(tmp_path / "run")["steps"] == 14


def test_a_kill_between_two_folders_of_the_model_brings_the_model_back(runs: Path, table: Path, tmp_path: Path) -> None:
    """The model is replaced when a finished run goes on: a folder cannot be renamed over another one."""
    run_dir = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    (run_dir / "model").rename(run_dir / ".partial-former-model")
    arguments = tiny_job(table, run_dir, f"train.max_steps={STEPS}")
    assert run_job([*arguments, "optim.lr=0.01"], 1).codes == [2]  # refused; it has opened the folder
    assert set(read_verified(run_dir / "model")) >= {"model.pth", "task.json"}
    finish(arguments)
    assert not list(run_dir.glob(".partial*"))


@pytest.mark.parametrize(
    ("was", "now", "virtual_ranks", "expected"),
    [
        ((4, 4), (4, 4), None, None),
        ((4, 4), (4, 2), None, "ranks of a host in the fast mode: were 4, are 2"),
        ((2, 2), (2, 1), None, None),  # there is one order to add up two numbers
        ((2, 2), (4, 2), None, "world size in the fast mode: was 2, is 4"),
        ((4, 4), (8, 2), 8, None),
        ((4, None), (4, 2), None, None),  # an old checkpoint does not say
    ],
)
def test_where_the_fast_mode_adds_up_in_another_order(
    was: tuple[int, int | None], now: tuple[int, int], virtual_ranks: int | None, expected: str | None
) -> None:
    state: dict[str, Any] = {"world_size": was[0], "config": {}} | ({"ranks_per_host": was[1]} if was[1] else {})
    config = load_config([f"train.virtual_ranks={'null' if virtual_ranks is None else virtual_ranks}"])
    ranks = Collectives(World(size=now[0], local_size=now[1]))
    assert _regrouped(config, state, ranks) == expected
