"""The scripts for a machine with a GPU, on the CPU: the parts run, and the table shows what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import REPOSITORY, environment
from tools.gpu import gpu_stories, gpu_table
from tools.gpu.gpu_place import Place
from tools.gpu.gpu_probe import PARTS

# The others take longer: the whole kit plays them.
QUICK = (
    "shapes", "longer_tail", "continued", "not_finite", "pinned_turns", "waits", "fallback", "ddp_in_a_graph",
    "ceilings", "steps", "host",
)  # fmt: skip


@pytest.fixture(scope="module")
def place() -> Place:
    return Place(torch.device("cpu"), short=True)


@pytest.mark.parametrize("part", QUICK)
def test_a_part_of_the_probe_runs_on_the_cpu(part: str, place: Place) -> None:
    result = PARTS[part](place)
    assert result.get("held", True), result["said"]
    json.dumps(result)


def test_a_story_says_whether_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    held = gpu_stories.play("not_finite", "cpu")
    assert held["held"], held["said"]
    monkeypatch.setitem(gpu_stories.STORIES, "broken", lambda stage: str(stage.run("train", "no-such-config.yaml")))
    broken = gpu_stories.play("broken", "cpu")
    assert not broken["held"]
    assert "ended with 2" in broken["said"]


def test_the_table_begins_with_what_did_not_hold(tmp_path: Path) -> None:
    stories = {name: {"held": held, "said": "why", "warnings": ["UserWarning: odd"]} for name, held in
               (("good", True), ("bad", False))}  # fmt: skip
    step = {"recorded": True, "wall_us": 5.0, "host_us": 2.0, "rows_per_second": 6.4e6}
    probe = {"machine": {"torch": "2.13"}, "shapes": {"held": False, "said": "not recorded"}, "steps": {"32": step}}
    rate = {"median": 1000.0, "spread": 1.5, "values": [1000.0]}
    for batch in (256, 32):
        row = {"batch_size": batch, "rows_per_second": {"dist_train": rate}, "ratio": {"tutorial": 9.0}}
        (tmp_path / f"bench_{batch}.json").write_text(json.dumps({"throughput_cuda": [row]}))
    (tmp_path / "stories.json").write_text(json.dumps(stories))
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    (tmp_path / "bench.log").write_text(
        "  JAX takes no part: ImportError: no\nmore\n  JAX takes no part: ImportError: no\n"
    )
    tests = tmp_path / "tests.xml"
    tests.write_text(
        '<testsuites><testsuite name="pytest" tests="2" failures="1" errors="0" skipped="0" time="3.0">'
        '<testcase name="test_one"><failure message="assert 1 == 2&#10;more">text</failure></testcase>'
        '<testcase name="test_two"/></testsuite></testsuites>'
    )
    gpu_table.merge(tmp_path, tmp_path / "bench.json")
    lines = list(gpu_table.lines(tmp_path, tests))
    assert lines[1] == "tests/gpu: 2 tests, 1 failures, 0 errors, 0 skipped in 3.0 s"
    assert lines[2] == "  FAILED test_one: assert 1 == 2"
    assert [line.split()[:2] for line in lines[3:6]] == [["BROKE", "bad:"], ["BROKE", "shapes:"], ["held", "good:"]]
    assert "  warned: UserWarning: odd" in lines
    assert lines[-1] == "  JAX takes no part: ImportError: no"
    assert [line.split()[0] for line in lines if "9.0x tutorial" in line] == ["32", "256"]


@pytest.mark.slow
def test_the_whole_kit_on_the_cpu_in_its_short_form(tmp_path: Path) -> None:
    variables = environment(OUT=str(tmp_path), PYTHON=sys.executable, DEVICE="cpu")
    done = subprocess.run(
        ["bash", "tools/gpu/device_run.sh", "--short", "tests", "probe"],
        cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout
    assert "BROKE" not in done.stdout
    assert len(done.stdout) < 12_000  # a summary, whatever the logs hold
    found = json.loads((tmp_path / "probe.json").read_text())
    assert set(PARTS) <= set(found)
    assert len(list(tmp_path.iterdir())) <= 8
