"""Weights & Biases: one run, monotone steps, never a step twice, and training never depends on it."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_train.run.tracking.wandb_tracker import Mode, WandbTracker, choose_mode
from tests.commands import run as run_command
from tests.patience import PATIENCE_SECONDS
from tests.resume.jobs import Trap, finish, run_job, tiny_job, write_table


class FakeWandb:
    """Stands for the module; `fail` names the call that raises, `hangs` the one that does not come back."""

    def __init__(self, fail: str = "", hangs: str = "") -> None:
        self.fail, self.hangs = fail, hangs
        self.inits: list[dict[str, Any]] = []
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[int] = []
        self.Settings = SimpleNamespace
        self.summary = self
        self.shown: dict[str, Any] = {}

    def _do(self, call: str) -> None:
        if call == self.hangs:
            threading.Event().wait(PATIENCE_SECONDS)
        if call == self.fail:
            raise RuntimeError("secret-token must not be shown")

    def init(self, **arguments: Any) -> FakeWandb:
        self._do("init")
        self.inits.append(arguments)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self._do("log")
        self.sent.append((step, values))

    def update(self, values: dict[str, Any]) -> None:
        self._do("summary")
        self.shown |= values

    def finish(self, exit_code: int) -> None:
        self._do("finish")
        self.finished.append(exit_code)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("dist_train"), "propagate", True)
    return caplog


def _warnings(heard: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in heard.records if record.levelno >= logging.WARNING]


def _fake(monkeypatch: pytest.MonkeyPatch, fail: str = "") -> FakeWandb:
    fake = FakeWandb(fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def _run(folder: Path, *, last_step: int = 0, mode: Mode = "offline") -> WandbTracker:
    return WandbTracker(folder=folder, name="n", project="p", mode=mode, config={"a": 1}, last_step=last_step)


def _record(step: int, split: str = "train") -> dict[str, Any]:
    return {"step": step, "split": split, "loss": 0.5, "per_class": {}, "confusion_matrix": []}


def test_a_run_is_opened_logged_and_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _fake(monkeypatch)
    run = _run(tmp_path)
    run.log(_record(1))
    run.log(_record(1, "valid"))
    run.close()
    run.close()
    assert fake.sent == [(1, {"train/loss": 0.5}), (1, {"valid/loss": 0.5})]
    assert fake.finished == [0]
    (opened,) = fake.inits
    assert (opened["resume"], opened["mode"], opened["dir"]) == ("allow", "offline", tmp_path)
    assert opened["config"] == {"a": 1}
    settings = vars(opened["settings"])
    assert settings["console"] == "off"
    assert settings["x_disable_meta"]
    assert json.loads((tmp_path / "wandb" / "run.json").read_text()) == {"id": opened["id"], "sent_step": 0}


def test_a_failed_run_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _fake(monkeypatch)
    _run(tmp_path).close(failed=True)
    assert fake.finished == [1]


def test_a_resumed_run_keeps_its_id_and_sends_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _fake(monkeypatch)
    first = _run(tmp_path)
    for step in (10, 20, 30):
        first.log(_record(step))
    # Killed. The checkpoint is of step 10; metrics.jsonl went to step 30 before it was cut.
    second = _run(tmp_path, last_step=30)
    second.log(_record(20))
    # Killed again, before step 30; metrics.jsonl has lost what the tracker was sent.
    third = _run(tmp_path, last_step=20)
    for step in (20, 30, 40, 50):
        third.log(_record(step))
    assert len({opened["id"] for opened in fake.inits}) == 1
    assert [step for step, _ in fake.sent] == [10, 20, 30, 40, 50]


def test_a_new_run_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _fake(monkeypatch)
    _run(tmp_path)
    (tmp_path / "new").mkdir()
    _run(tmp_path / "new", last_step=30).log(_record(10))  # lines that no wandb run has been sent
    assert len({opened["id"] for opened in fake.inits}) == 2
    assert [step for step, _ in fake.sent] == [10]


SUMMARY = {
    "best_step": 20, "weights_sha256": "ab", "steps": 30, "valid": {"loss": 0.4, "auroc": None, "per_class": {}},
    "test": {"loss": 0.5, "confusion_matrix": []},
}  # fmt: skip


def test_the_summary_is_of_the_best_weights_and_not_of_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _fake(monkeypatch)
    run = _run(tmp_path)
    run.log(_record(1, "valid"))
    run.log_summary(SUMMARY)
    run.log_summary(SUMMARY | {"test": None})
    run.close()
    assert fake.shown == {
        "best_step": 20, "weights_sha256": "ab", "valid/loss": 0.4, "valid/auroc": None, "test/loss": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("call", ["init", "log", "summary", "finish"])
def test_a_failure_is_one_warning_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture, call: str
) -> None:
    _fake(monkeypatch, call)
    run = _run(tmp_path)
    for step in (1, 2, 3):
        run.log(_record(step))
    run.log_summary(SUMMARY)
    run.close()
    assert _warnings(heard) == ["wandb failed (RuntimeError): training goes on without it"]


@pytest.mark.parametrize("call", ["init", "log", "summary", "finish"])
def test_a_server_that_does_not_answer_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture, call: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(hangs=call))
    run = WandbTracker(
        folder=tmp_path, name="n", project="p", mode="online", config={}, last_step=0, patience_seconds=0.1
    )
    for step in (1, 2, 3):
        run.log(_record(step))
    run.log_summary(SUMMARY)
    run.close()
    assert _warnings(heard) == ["wandb failed (TimeoutError): training goes on without it"]


def test_a_missing_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = _run(tmp_path)
    run.log(_record(1))
    run.close()
    assert _warnings(heard) == ["wandb is not installed: metrics go to metrics.jsonl alone"]


def test_disabled_does_not_even_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = _run(tmp_path, mode="disabled", last_step=9)
    run.log(_record(1))
    run.close()
    assert _warnings(heard) == []
    assert list(tmp_path.iterdir()) == []


def test_the_mode_is_chosen_without_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    nobody = {"NETRC": str(tmp_path / "none")}
    assert choose_mode("auto", nobody) == "offline"
    assert choose_mode("auto", nobody | {"WANDB_API_KEY": ""}) == "offline"
    assert choose_mode("auto", nobody | {"WANDB_API_KEY": "k"}) == "online"
    assert choose_mode("auto", nobody | {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}) == "offline"
    assert choose_mode("auto", nobody | {"WANDB_MODE": "disabled"}) == "disabled"
    assert choose_mode("auto", nobody | {"WANDB_MODE": "nonsense"}) == "offline"
    assert choose_mode("disabled", nobody | {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}) == "disabled"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    assert choose_mode("auto", {"NETRC": str(tmp_path / "netrc")}) == "online"
    (tmp_path / "netrc").write_text("machine example.com login user password k\n")
    assert choose_mode("auto", {"NETRC": str(tmp_path / "netrc")}) == "offline"
    (tmp_path / "netrc").write_text("this is no netrc\n")
    assert choose_mode("auto", {"NETRC": str(tmp_path / "netrc")}) == "offline"


FAKE_IN_A_FILE = """
import os, pathlib
from types import SimpleNamespace as Settings
_log = pathlib.Path(__file__).with_name("calls")
def _note(text):
    with _log.open("a") as stream:
        stream.write(f"{os.environ['RANK']} {text}\\n")
class Summary:
    def update(self, values): _note(f"summary {sorted(values)[-1].split('/')[0]}")
class Run:
    summary = Summary()
    def log(self, values, step): _note(f"log {step} {sorted(values)[0].split('/')[0]}")
    def finish(self, exit_code): _note("finish")
def init(**a):
    _note(f"init {a['id']}")
    return Run()
"""


def test_only_rank_0_and_one_run_over_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks in processes of their own, with a module `wandb` that writes down how it is called."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_IN_A_FILE)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    table = write_table(tmp_path / "t.csv")
    arguments = tiny_job(table, tmp_path / "run", "train.max_steps=21", "wandb.mode=offline")
    assert run_job(arguments, 2, Trap(step=4)).killed  # a line of step 3, no checkpoint
    assert run_job(arguments, 2, Trap(step=9)).killed  # lines up to step 9, checkpoint of step 7
    assert run_job(arguments, 2, Trap(step=8)).killed  # before a line is due
    finish(arguments, 2)
    calls = [line.split() for line in (tmp_path / "fake" / "calls").read_text().splitlines()]
    assert {call[0] for call in calls} == {"0"}
    assert len({call[2] for call in calls if call[1] == "init"}) == 1
    sent = [(int(call[2]), call[3]) for call in calls if call[1] == "log"]
    assert sent == sorted(sent, key=lambda line: line[0])
    assert len(sent) == len(set(sent))
    assert [step for step, split in sent if split == "train"] == [3, 6, 9, 12, 15, 18, 21]
    assert [call[1:] for call in calls[-2:]] == [["summary", "weights_sha256"], ["finish"]]
    assert [call[1] for call in calls].count("finish") == 1


def test_the_real_wandb_offline_leaves_a_run_and_no_secret(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    table = write_table(tmp_path / "t.csv")
    arguments = [a for a in tiny_job(table, tmp_path / "run", "train.max_steps=7") if a != "wandb.mode=disabled"]
    secret = "planted-5ecret-91c7"
    done = run_command("train", *arguments, MY_SERVICE_TOKEN=secret, NETRC=str(tmp_path / "none"))
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stderr.replace(str(tmp_path), ""), "no warning, no prompt"
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("run-*.wandb"))
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file
    assert secret not in done.stdout + done.stderr
