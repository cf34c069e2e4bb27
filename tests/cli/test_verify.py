"""Verification believes an honest run, and names the step of a run in which anything has been altered."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config.load import read_config
from dist_train.data.dataset import load_dataset
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.run.checkpoint.commit import commit
from dist_train.run.checkpoint.run_folder import RunFolder
from dist_train.run.checkpoint.state import encode_parts, read_parts, weights_sha256
from dist_train.run.checkpoint.witness import linked, read_chain
from dist_train.run.verification.evidence import Evidence
from tests.cli.in_process import command, command_on_ranks
from tests.resume.jobs import finish, folder_of, tiny_job, write_table
from tests.run.forging import forge_chain, write_chain

STEPS = 24


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the exact mode, trained on two ranks."""
    folder = tmp_path_factory.mktemp("honest")
    table = write_table(folder / "clients.csv")
    more = ("train.virtual_ranks=4", f"train.max_steps={STEPS}", "checkpoint.keep=3")
    arguments = tiny_job(table, folder / "run", *more)
    finish(arguments, 2)
    return folder_of(arguments)


def saves(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are there."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def copy(honest: Path, tmp_path: Path) -> Path:
    """The run, to be tampered with; its table lies beside it."""
    shutil.copytree(honest.parent, tmp_path / "copy")
    config = tmp_path / "copy" / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(honest.parent), str(tmp_path / "copy")))
    return tmp_path / "copy" / "run"


def test_an_honest_run_is_believed_on_one_process(honest: Path) -> None:
    before = {p: p.read_bytes() for p in honest.rglob("*") if p.is_file()}
    seen = command("verify", honest)
    assert seen.code == 0, seen.err
    report = json.loads(seen.out)
    summary = json.loads((honest / "summary.json").read_text())
    assert report["difference"] is None
    assert report["notes"] == []
    assert report["first_step"] == 0
    assert report["last_step"] == STEPS
    assert report["lines"] == len((honest / "metrics.jsonl").read_text().splitlines())
    assert report["checkpoints"] >= len(saves(honest)) > 2
    assert report["weights_sha256"] == summary["weights_sha256"]
    assert report["data_sha256"] == summary["data_sha256"]
    assert report["machine"] == summary["machine"]
    assert report["config"]["train"]["virtual_ranks"] == 4
    assert {p: p.read_bytes() for p in honest.rglob("*") if p.is_file()} == before


def test_part_of_it_on_another_world_size(honest: Path) -> None:
    first, _, last = saves(honest)[-3:]
    done = command_on_ranks(4, "verify", honest, "--steps", f"{first}:{last}")
    assert [rank.code for rank in done] == [0] * 4, done
    assert [rank.out for rank in done[1:]] == [""] * 3
    report = json.loads(done[0].out)
    assert (report["first_step"], report["last_step"], report["difference"]) == (first, last, None)
    assert 0 < report["checkpoints"] < len(saves(honest))


def test_the_evidence_that_every_rank_gets_holds_digests_and_no_tensors(honest: Path) -> None:
    evidence = Evidence.of(RunFolder(honest))
    assert evidence.model is not None
    parts = [part for kept in (*evidence.checkpoints.values(), evidence.model) for part in kept.values()]
    assert len(parts) > 3
    assert not [part for part in parts if any(isinstance(value, torch.Tensor) for value in part.values())]


def test_a_running_run_can_be_verified(copy: Path) -> None:
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "model")
    with (copy / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 25, "epo')  # a line that is just being written
    seen = command("verify", copy)
    assert seen.code == 0, seen.err
    assert "not finished" in json.loads(seen.out)["notes"][0]


def altered_tensor(run_dir: Path) -> None:
    """One bit of one number of the moments at step 20, with a manifest that vouches for it."""
    checkpoint = run_dir / "checkpoints" / "step_00000020"
    parts = read_parts(checkpoint)
    name = next(n for n in parts["optimizer.pth"] if n.endswith("exp_avg"))
    tensor = parts["optimizer.pth"][name]
    tensor.view(-1)[0] = tensor.view(-1)[0] * (1 + 2**-20)
    commit(checkpoint, encode_parts(parts))


def flipped_bit(run_dir: Path) -> None:
    part = run_dir / "checkpoints" / "step_00000020" / "model.pth"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(bytes(data))


def altered_weights(run_dir: Path) -> None:
    parts: dict[str, Any] = read_parts(run_dir / "model")
    parts["model.pth"]["layers.0.weight"][0, 0] += 1e-6
    commit(run_dir / "model", encode_parts(parts))
    edit_summary(weights_sha256=weights_sha256(parts["model.pth"]))(run_dir)


def altered_encoder(run_dir: Path) -> None:
    for folder in (run_dir / "model", *(run_dir / "checkpoints").iterdir()):
        parts = read_parts(folder)
        parts["task.json"]["spec"]["numeric"][0]["median"] += 1000
        commit(folder, encode_parts(parts))


def altered_progress(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step_00000020"
    parts = read_parts(checkpoint)
    parts["state.json"]["progress"]["best_value"] = 0.1
    commit(checkpoint, encode_parts(parts))


def edit_summary(**values: Any) -> Callable[[Path], None]:
    def alter(run_dir: Path) -> None:
        summary = json.loads((run_dir / "summary.json").read_text())
        summary |= values | ({"test": summary["test"] | values["test"]} if "test" in values else {})
        (run_dir / "summary.json").write_text(json.dumps(summary))

    return alter


def edit_line(number: int, edit: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Callable[[Path], None]:
    def alter(run_dir: Path) -> None:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        edited = edit(json.loads(lines[number]))
        lines[number : number + 1] = [] if edited is None else [json.dumps(edited)]
        (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    return alter


def altered_row(run_dir: Path, split: str) -> None:
    """Another income in one row of a split; the row keeps its place, and so do all the others."""
    table = run_dir.parent / "clients.csv"
    config = read_config(run_dir / "config.yaml")
    data = load_dataset(config.data, Collectives(World()), seed=0, dtype=torch.float32)
    lines = table.read_text().splitlines()
    number = int(data.splits[split].row_numbers[7]) + 1
    income, rest = lines[number].split(",", 1)
    lines[number] = f"{float(income) + 0.5},{rest}"
    table.write_text("\n".join(lines) + "\n")


def edit_settings(before: str, after: str) -> Callable[[Path], None]:
    def alter(run_dir: Path) -> None:
        file = run_dir / "config.yaml"
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after))

    return alter


def edit_witness(number: int, name: str, value: Any) -> Callable[[Path], None]:
    def alter(run_dir: Path) -> None:
        lines = [json.loads(line) for line in (run_dir / "witness.jsonl").read_text().splitlines()]
        lines[number][name] = value
        write_chain(run_dir, lines)

    return alter


def without_lines(number: int) -> Callable[[Path], None]:
    def alter(run_dir: Path) -> None:
        lines = (run_dir / "witness.jsonl").read_text().splitlines(keepends=True)
        del lines[number]
        (run_dir / "witness.jsonl").write_text("".join(lines))

    return alter


def swapped_model(run_dir: Path) -> None:
    """The trained model of another run, sound in itself, with its hash in the summary."""
    parts: dict[str, Any] = read_parts(run_dir / "model")
    parts["model.pth"]["layers.0.weight"] *= 2
    digest = weights_sha256(parts["model.pth"])
    parts["model.json"] |= {"weights_sha256": digest, "witness": {"lines": 9, "head": "0" * 64}}
    commit(run_dir / "model", encode_parts(parts))
    edit_summary(weights_sha256=digest)(run_dir)


def another_chain(run_dir: Path) -> None:
    """A chain that is sound in itself, of other lines."""
    lines, head = [], ""
    for line in read_chain(run_dir / "witness.jsonl") or []:
        lines.append(linked(head, line | {"format": 1, "metrics_sha256": line.get("metrics_sha256", "0")}))
        head = lines[-1]["head"]
    write_chain(run_dir, lines)


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (altered_tensor, "step 20 differs: the checkpoint's optimizer.pth, tensor"),
        (flipped_bit, "step 20 differs: the checkpoint does not verify"),
        (altered_weights, "differs: the trained model's model.pth, tensor layers.0.weight is not what the replay has"),
        (edit_summary(weights_sha256="0"), "differs: model/model.pth does not have the weights_sha256 of summary.json"),
        (edit_summary(test={"loss": 0.1}), "differs: the summary's test loss is not what the replayed weights have"),
        (altered_encoder, "differs: the checkpoint's task (fitted preprocessing) is not what the replay has"),
        (altered_progress, "step 20 differs: the checkpoint's best_value is not what the replay has"),
        (edit_line(4, lambda line: line | {"loss": line["loss"] * (1 + 2**-51)}), "differs: {split} loss: recorded"),
        (edit_line(0, lambda line: line | {"grad_norm": 0.1}), "differs: {split} grad_norm: recorded"),
        (edit_line(4, lambda line: line | {"samples": line["samples"] + 1}), "differs: {split} samples: recorded"),
        (edit_line(4, lambda _: None), "differs: metrics.jsonl has no {split} line of this step"),
        (edit_line(4, lambda line: line | {"split": "test"}), "{split} line of this step"),
    ],
)
def test_what_was_altered_is_named_with_its_step(copy: Path, alter: Callable[[Path], None], named: str) -> None:
    number = 0 if "grad_norm" in named else 4
    line = json.loads((copy / "metrics.jsonl").read_text().splitlines()[number])
    alter(copy)
    forge_chain(copy)
    seen = command("verify", copy)
    assert seen.code == 1
    assert seen.err.count("error:") == 1
    assert named.format(split=line["split"]) in seen.err
    if "{split}" in named:
        assert f"step {line['step']} differs" in seen.err
    assert json.loads(seen.out)["difference"] is not None


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (altered_tensor, "step 20 differs: the checkpoint's optimizer.pth is not that of witness.jsonl"),
        (altered_weights, "the trained model's weights are not those of witness.jsonl"),
        (altered_encoder, "the checkpoint's task.json is not that of witness.jsonl"),
        (altered_progress, "step 20 differs: the checkpoint's progress is not that of witness.jsonl"),
        (edit_line(4, lambda line: line | {"loss": line["loss"] * (1 + 2**-51)}), "of metrics.jsonl are not those of"),
        (edit_line(4, lambda _: None), "of metrics.jsonl are not those of witness.jsonl"),
        (edit_settings("lr: 0.05", "lr: 0.06"), "step 0 differs: optim.lr: the run's configuration is not that of"),
        (edit_witness(3, "metrics_lines", 1), "witness.jsonl, line 4: the chain is broken: its head does not follow"),
        (edit_witness(0, "data_sha256", "0"), "witness.jsonl, line 1: the chain is broken: its head does not follow"),
        (swapped_model, "the trained model's model.json does not name the head of witness.jsonl"),
        (edit_witness(3, "state", {"model.pth": 1}), "witness.jsonl, line 4: is not a line of a chain"),
        (edit_witness(3, "metrics_lines", -1), "witness.jsonl, line 4: is not a line of a chain"),
        (edit_witness(0, "config", {"train": 3}), "witness.jsonl, line 1: is not a line of a chain"),
        (edit_witness(0, "config", 3), "witness.jsonl, line 1: is not a line of a chain"),
        (lambda run_dir: (run_dir / "witness.jsonl").write_bytes(b"\xff\n"), "witness.jsonl: cannot be read"),
        (lambda run_dir: (run_dir / "witness.jsonl").write_bytes(b""), "witness.jsonl: is empty"),
        (edit_witness(3, "step", "four"), "witness.jsonl, line 4: is not a line of a chain"),
        (without_lines(4), "witness.jsonl, line 5: the chain is broken: its head does not follow"),
        (without_lines(-1), "the trained model's model.json does not name the head of witness.jsonl"),
        (lambda run_dir: (run_dir / "witness.jsonl").unlink(), "there is no witness.jsonl, and the trained model's"),
        (another_chain, "the trained model's model.json does not name the head of witness.jsonl"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_chain_is_named_without_a_replay(
    copy: Path, alter: Callable[[Path], None], named: str
) -> None:
    alter(copy)
    seen = command("verify", copy)
    assert seen.code == 1
    assert seen.err.count("error:") == 1
    assert named in seen.err
    assert "replayed" not in seen.err
    assert named in f"step {json.loads(seen.out)['difference_step']} differs: {json.loads(seen.out)['difference']}"


@pytest.mark.parametrize("claimed", ["no", {"lines": "no"}, {"head": 3}, {"lines": 10**30, "head": "0"}, [1]])
def test_a_model_that_names_no_head_is_one_line(copy: Path, claimed: Any) -> None:
    parts = read_parts(copy / "model")
    parts["model.json"]["witness"] = claimed
    commit(copy / "model", encode_parts(parts))
    seen = command("verify", copy)
    assert (seen.code, seen.err.count("error:")) == (1, 1)
    assert "the trained model's model.json does not name the head of witness.jsonl" in seen.err


def test_a_chain_of_a_later_version_is_refused(copy: Path) -> None:
    edit_witness(0, "format", 2)(copy)
    seen = command("verify", copy)
    assert (seen.code, seen.err.count("\n")) == (2, 1)
    assert "line 1: is a witness.jsonl of format 2; this version of dist_train reads the formats 1 to 1" in seen.err


def test_a_run_without_a_chain_is_of_an_earlier_version(copy: Path) -> None:
    (copy / "witness.jsonl").unlink()
    parts = read_parts(copy / "model")
    del parts["model.json"]["witness"]
    commit(copy / "model", encode_parts(parts))
    seen = command("verify", copy)
    assert seen.code == 0, seen.err
    assert json.loads(seen.out)["notes"] == ["there is no witness.jsonl: an earlier version has trained the run"]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_an_altered_row_of_the_data_is_found(copy: Path, split: str) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    altered_row(copy, split)
    seen = command("verify", copy)
    assert seen.code == 1
    if split == "test":
        best = json.loads((copy / "summary.json").read_text())["best_step"]
        assert f"error: step {best} differs: the summary's test" in seen.err
    else:
        first = next(line for line in lines if line["split"] == split)
        assert f"error: step {first['step']} differs: {split} " in seen.err


def test_a_cell_that_nothing_is_computed_from_is_still_another_file(copy: Path) -> None:
    table = copy.parent / "clients.csv"
    table.write_text(table.read_text() + "\n")
    seen = command("verify", copy)
    assert seen.code == 1
    assert f"error: step {STEPS} differs: the data are not those of the run" in seen.err


def test_damage_outside_of_the_range_is_not_its_business(copy: Path) -> None:
    flipped_bit(copy)
    assert command("verify", copy, "--steps", "0:10").code == 0


def trained_elsewhere(run_dir: Path, **machine: str) -> None:
    """As if the run had been trained on another machine."""
    for step in saves(run_dir):
        checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
        parts = read_parts(checkpoint)
        parts["state.json"]["machine"] |= machine
        commit(checkpoint, encode_parts(parts))


def test_another_build_is_said_in_words(copy: Path) -> None:
    trained_elsewhere(copy, torch="2.0.0")
    seen = command("verify", copy)
    assert seen.code == 0
    assert "the run had 2.0.0: equal bits are not promised" in json.loads(seen.out)["notes"][0]


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512", "DEFAULT"])
def test_the_bits_of_another_processor_are_the_same(copy: Path, instructions: str) -> None:
    trained_elsewhere(copy, processor="abacus", instructions=instructions)
    seen = command("verify", copy)
    assert (seen.code, json.loads(seen.out)["notes"]) == (0, [])
    assert f"the same bits were computed on abacus ({instructions}) and on " in seen.err


@pytest.mark.parametrize(
    ("line", "altered"),
    [("  products: defined", "  products: library"), ("  precision: float32", "  precision: float64")],
)
def test_a_processor_whose_bits_are_others_is_said_in_words(line: str, altered: str, copy: Path) -> None:
    trained_elsewhere(copy, processor="abacus", instructions="AVX512")
    config = copy / "config.yaml"
    assert line in config.read_text()
    config.write_text(config.read_text().replace(line, altered))
    forge_chain(copy)
    notes = json.loads(command("verify", copy).out)["notes"]
    assert any("the run had abacus: equal bits are not promised" in note for note in notes)


def test_a_run_in_the_fast_mode_needs_its_own_world_size(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    arguments = tiny_job(table, tmp_path / "fast", "train.max_steps=10")
    finish(arguments, 2)
    seen = command("verify", folder_of(arguments))
    assert seen.code == 2
    assert "on 2 ranks" in seen.err
    done = command_on_ranks(2, "verify", folder_of(arguments))
    assert [rank.code for rank in done] == [0, 0], done


@pytest.mark.parametrize("steps", ["5", "a:b", "9:3", "100:"])
def test_a_range_without_steps_is_refused(honest: Path, steps: str) -> None:
    seen = command("verify", honest, "--steps", steps)
    assert seen.code == 2
    assert "error:" in seen.err


def test_a_world_size_that_does_not_divide_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    done = command_on_ranks(3, "train", *tiny_job(table, tmp_path / "run", "train.virtual_ranks=8"))
    assert [rank.code for rank in done] == [2] * 3
    mistake = "error: train.virtual_ranks=8 cannot be shared by 3 ranks; it works on 1, 2, 4 or 8"
    assert all(rank.err.startswith(mistake) and rank.err.count("\n") == 1 for rank in done), done
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_changed_on_the_way_is_replayed_from_the_change_on(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    more = ("train.virtual_ranks=4", "checkpoint.keep=9")
    finish(tiny_job(table, tmp_path / "run", *more, "train.max_steps=11"), 2)
    finish(tiny_job(table, tmp_path / "run", *more, "train.max_steps=19", "log.every_steps=2"), 1)
    seen = command("verify", tmp_path / "run")
    assert seen.code == 0, seen.err
    report = json.loads(seen.out)
    assert report["first_step"] == 11
    assert report["model_compared"]
    assert "changed at step 11: log.every_steps: was 3, is 2; train.max_steps: was 11, is 19" in report["notes"]


def test_the_same_command_again_changes_nothing(honest: Path) -> None:
    assert not (honest / "changes.jsonl").exists()


def _as_of_format_1(run_dir: Path) -> None:
    """A run of two classes as format 1 wrote it: its Brier score was the sum over both."""
    for folder, part in [(f, "state.json") for f in (run_dir / "checkpoints").iterdir()] + [
        (run_dir / "model", "model.json")
    ]:
        parts = read_parts(folder)
        parts[part]["format"] = 1
        commit(folder, encode_parts(parts))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line | ({"brier": 2 * line["brier"]} if "brier" in line else {}) for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((run_dir / "summary.json").read_text())
    for split in ("valid", "test"):
        summary[split]["brier"] *= 2
    (run_dir / "summary.json").write_text(json.dumps(summary))
    forge_chain(run_dir)


def test_a_metric_that_was_redefined_is_said_in_words(tmp_path: Path) -> None:
    table = write_table(tmp_path / "clients.csv")
    table.write_text(table.read_text().replace(",middle", ",low"))
    arguments = tiny_job(table, tmp_path / "run", "train.virtual_ranks=2", "train.max_steps=12", "checkpoint.keep=9")
    finish(arguments)
    run_dir = tmp_path / "run"
    seen = command("verify", run_dir)
    assert (seen.code, json.loads(seen.out)["notes"]) == (0, []), seen.err
    _as_of_format_1(run_dir)
    seen = command("verify", run_dir)
    assert seen.code == 0, seen.err
    note = "brier is not compared: its definition has changed since the run was trained; of two classes it is now"
    assert [line.startswith(note) for line in json.loads(seen.out)["notes"]] == [True]
    assert note in seen.err

    again = command("train", *[a for a in arguments if "max_steps" not in a], "train.max_steps=20")
    assert again.code == 0, again.err
    report = json.loads(command("verify", run_dir).out)
    assert (report["difference"], report["first_step"]) == (None, 12)
    assert "the metric brier: of two classes it is now" in report["notes"][0]
