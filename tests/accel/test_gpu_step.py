"""The kernels of a GPU's step, in Triton's interpreter, against the modules that they replace."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.determinism.dropout import KeyedDropout
from dist_train.determinism.position import Position
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World
from dist_train.errors import TrainingFault
from dist_train.run.session import build_loop
from tests.accel.interpreted import Job, make_job, needs_interpreter, write_numbers
from tests.execution.test_recorded import Repeater

# After tests.accel.interpreted, which loads them.
import triton.language as tl  # isort: skip
from triton.runtime import interpreter  # isort: skip

from dist_train.accel import gpu_layers, gpu_network  # isort: skip
from dist_train.execution import fused as fused_steps  # isort: skip

pytestmark = needs_interpreter

ROWS = 52  # three steps of 24 rows an epoch, the last one of which has 4
FEWER = 28  # two steps
WEIGHTED = ["data.drop=[]", "data.weight=amount"]
# The exact mode on a GPU computes with what its libraries give.
AS_ON_GPU = "runtime.products=library"
SMALL = ["train.global_batch_size=16"]


def follow(ours: Job, plain: Job, steps: int, tolerance: float = 1e-6) -> list[list[float]]:
    """Take steps of both, each from where the modules stand, compare all that they change, and return the results.

    From where the modules stand: over many steps two float32 trainings part, whatever they are computed with. Loss and
    norm are compared relatively, the norm with twice the tolerance; weights, statistics and moments absolutely.
    """
    # Far from 0, where AdamW makes a step as long as the learning rate out of a gradient that is rounding.
    plain.session.optimizer.moments[1].fill_(1e-4)
    results: list[list[float]] = []
    ours.take_over(plain)
    for found, expected in zip(ours.one_by_one(steps), plain.one_by_one(steps), strict=True):
        assert found == pytest.approx(expected, rel=2 * tolerance, abs=0)
        assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=0)
        state = plain.state
        assert ours.state.keys() == state.keys()
        for name, value in ours.state.items():
            difference = (value.double() - state[name].double()).abs().max().item()
            assert difference <= tolerance, f"step {len(results)}: {name}: {difference}"
        ours.take_over(plain)
        results.append(expected)
    return results


def assert_same(ours: Job, other: Job) -> None:
    assert ours.results == other.results
    expected = other.state
    for name, value in ours.state.items():
        assert torch.equal(value, expected[name]), name


@needs_interpreter
@pytest.mark.parametrize("steps", [7, pytest.param(50, marks=pytest.mark.slow)])
def test_many_steps_are_those_of_the_modules(tmp_path: Path, steps: int) -> None:
    """Numeric features, whose table the kernels read as it is; its rows are filled up to eight numbers."""
    arguments = [*write_numbers(tmp_path / "table.parquet", ROWS, 7), *SMALL]
    ours, plain = make_job(arguments, Repeater()), make_job(arguments, None)
    assert ours.fused is not None
    before = plain.state["model layers.0.weight"]
    results = follow(ours, plain, steps)
    assert ours.fused._table is not None
    assert ours.fused._table.features.shape == (ROWS, 8)
    assert results[3][2] == 1  # the vote
    # Equality of nothing would prove nothing.
    assert (plain.state["model layers.0.weight"] - before).abs().max() > 1e-3
    assert steps < 50 or results[-3][0] < 0.9 * results[0][0]


def freeze(*places: int) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        layers = model.get_submodule("layers")
        assert isinstance(layers, nn.Sequential)
        for place in places:
            layers[place].requires_grad_(False)

    return change


def without_biases(model: nn.Module) -> None:
    for place in (0, 4, 7):
        model.get_submodule(f"layers.{place}").register_parameter("bias", None)


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "more"),
    [
        pytest.param(ROWS, ["train.virtual_ranks=2", "train.ema_decay=0.9", AS_ON_GPU], id="two slices"),
        pytest.param(
            21, ["train.virtual_ranks=8", "train.global_batch_size=9", AS_ON_GPU, *WEIGHTED], id="0 and 1 row"
        ),
    ],
)
def test_steps_of_the_exact_mode_are_those_of_the_modules(tmp_path: Path, rows: int, more: list[str]) -> None:
    arguments = [*write_numbers(tmp_path / "table.parquet", rows, 6), *more]
    ours, plain = make_job(arguments, Repeater()), make_job(arguments, None)
    assert ours.fused is not None
    follow(ours, plain, 4)


@pytest.mark.parametrize(
    ("features", "classes", "more", "change"),
    [
        pytest.param(6, 3, ["train.class_weights=balanced", "train.label_smoothing=0.1"], None, id="loss"),
        pytest.param(6, 3, [*WEIGHTED, "train.ema_decay=0.9"], None, id="weights of rows, moving average"),
        pytest.param(6, 3, ["model.dropout=0", "optim.max_grad_norm=null"], None, id="no dropout, no clipping"),
        pytest.param(6, 3, ["optim.max_grad_norm=0.05", "optim.weight_decay=0.3"], None, id="clipped, decayed"),
        pytest.param(5, 6, ["train.class_weights=balanced", "train.label_smoothing=0.2"], None, id="six classes"),
        pytest.param(70, 3, ["train.global_batch_size=33"], None, id="70 features"),
        pytest.param(6, 3, ["model.hidden_dim=22", "model.dropout=0.5"], None, id="22 and 11 units"),
        pytest.param(6, 3, ["model.hidden_dim=74"], None, id="74 and 37 units"),
        pytest.param(6, 3, [], freeze(0), id="first layer frozen"),
        pytest.param(6, 3, [], freeze(4, 1), id="second layer and BatchNorm frozen"),
        pytest.param(6, 3, [], freeze(7), id="last layer frozen"),
        pytest.param(6, 3, [], without_biases, id="no biases"),
    ],
)
def test_steps_are_those_of_the_modules(
    tmp_path: Path, features: int, classes: int, more: list[str], change: Callable[[nn.Module], None] | None
) -> None:
    """Over the ragged end of an epoch."""
    arguments = [*write_numbers(tmp_path / "table.parquet", FEWER, features, classes), *more]
    ours, plain = make_job(arguments, Repeater(), change), make_job(arguments, None, change)
    assert ours.fused is not None
    assert all(result[4] == 1 for result in follow(ours, plain, 3))


@needs_interpreter
def test_features_that_the_model_makes_are_gathered(tmp_path: Path) -> None:
    """One-hot categories."""
    arguments = write_numbers(tmp_path / "table.parquet", FEWER, 5, cities=True)
    ours, plain = make_job(arguments, Repeater()), make_job(arguments, None)
    follow(ours, plain, 3)
    assert ours.fused is not None
    assert ours.fused._table is None


@needs_interpreter
def test_bf16_is_that_of_the_modules_but_for_its_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_bfloat16)
    arguments = [*write_numbers(tmp_path / "table.parquet", FEWER, 6), "train.precision=bf16"]
    ours, plain = make_job(arguments, Repeater()), make_job(arguments, None)
    single = make_job([*arguments, "train.precision=float32"], None)
    follow(ours, plain, 3, 2e-2)
    with pytest.raises(AssertionError):
        follow(make_job(arguments, Repeater()), single, 3, 1e-5)


def dot_of_bfloat16(_: Any, a: Any, b: Any, sums: Any, *_options: Any) -> Any:
    """The interpreter of Triton 3.6 multiplies the bits of bfloat16 numbers as integers."""
    wide = [(x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
    return interpreter.TensorHandle(np.matmul(*wide) + sums.data, sums.dtype.scalar)


def store_kept(  # type: ignore[no-untyped-def]
    out, counter, first_row, first_column, width, threshold,
    BM: tl.constexpr, BN: tl.constexpr,  # noqa: N803  of Triton
):  # fmt: skip
    rows, columns = tl.arange(0, BM), first_column + tl.arange(0, BN)
    increment = gpu_network._SIGNED_INCREMENT
    kept = gpu_layers._kept(counter, first_row + rows, first_column, width, threshold, increment, BM, BN)
    tl.store(out + rows[:, None] * width + columns[None, :], kept, mask=(columns < width)[None, :])


@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 17, 38, 71])
@pytest.mark.parametrize("probability", [0.3, 0.9999])
def test_masks_are_those_of_keyed_dropout(width: int, probability: float) -> None:
    """Whether or not the width is a multiple of the four numbers that one draw gives; far into a large epoch too."""
    context = ModelContext(seed=width)
    dropout = KeyedDropout(probability, "dropout here", context)
    for epoch, first_row in ((0, 0), (3, 1 << 33)):
        with context.bound(BatchContext(epoch, first_row, (21,))):
            expected = dropout(torch.ones(21, width)) != 0
            counter = context.counter_for("dropout here", width)
        kept = torch.zeros(21, width, dtype=torch.bool)
        for first in range(0, 21, 16):
            part = torch.zeros(16, width, dtype=torch.bool)
            for column in range(0, width, 16):
                run_in_interpreter(store_kept, part, counter, first, column, width, dropout.threshold, BM=16, BN=16)
            kept[first : first + 16] = part[: 21 - first]
        assert torch.equal(kept, expected)


def run_in_interpreter(kernel: Callable[..., None], *arguments: Any, **constants: Any) -> None:
    interpreter.InterpretedFunction(kernel)[(1,)](*arguments, **constants)


@pytest.fixture(scope="module")
def long_epoch(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a job whose epoch has ten steps of 16 rows and one of 4."""
    table = tmp_path_factory.mktemp("long") / "table.parquet"
    return [*write_numbers(table, 164, 6), *SMALL, "train.ema_decay=0.9"]


@pytest.fixture(scope="module")
def one_by_one(long_epoch: list[str]) -> Job:
    """The same job after an epoch and two steps, each sent off by itself."""
    return make_job(long_epoch, Repeater()).take(13)


def test_steps_sent_off_together_are_the_same_bits_as_one_by_one(long_epoch: list[str], one_by_one: Job) -> None:
    """Over the end of an epoch: ten steps of 16 rows, one by one and eight in one graph, one of 4, two of 16."""
    recorder = Repeater()
    assert_same(make_job(long_epoch, recorder).take_held(13), one_by_one)
    assert recorder.recordings == 2
    assert recorder.runs == 4  # eight steps; one before the epoch's end, two after it


def test_a_gpu_that_has_nothing_to_do_is_sent_what_is_put_off(
    long_epoch: list[str], one_by_one: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thirteen steps of 16 rows the first two go together, so do the next two, and the rest when it is asked for."""
    job = make_job(long_epoch, Repeater())
    idle, sent, send = iter([True, True]), [], fused_steps.FusedSteps._send

    def counted(own: Any, steps: list[Any], results: torch.Tensor) -> None:
        sent.append(len(steps))
        send(own, steps, results)

    monkeypatch.setattr(fused_steps, "_ROWS_FOR_AN_IDLE_GPU", 32)
    monkeypatch.setattr(fused_steps.FusedSteps, "_idle", lambda _: next(idle, False))
    monkeypatch.setattr(fused_steps.FusedSteps, "_send", counted)
    assert_same(job.take_held(13), one_by_one)
    assert sent == [2, 2, 9]


def poisoned(arguments: list[str], step: int) -> Job:
    """A job in whose rows of a step, counted from 0, one number is NaN."""
    job = make_job(arguments, Repeater())
    (batch,), _ = next(islice(job.session.feed.steps(Position(0, 0)), step, None))
    table = batch.table
    assert table is not None
    table.inputs[0][batch.index[3], 2] = math.nan
    return job


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, at NaN
def test_a_step_that_is_not_finite_updates_nothing(tmp_path: Path) -> None:
    arguments = [*write_numbers(tmp_path / "table.parquet", 100, 6), *SMALL, "train.ema_decay=0.9"]
    job, other = poisoned(arguments, 4).take(5), make_job(arguments, Repeater()).take(4)
    assert [result[4] for result in job.results] == [1, 1, 1, 1, 0]
    assert math.isnan(job.results[4][0])
    assert job.results[:4] == other.results
    expected = other.state
    for name, value in job.state.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, at NaN
@pytest.mark.parametrize("put_off", [True, False])
def test_the_loop_ends_at_the_step_that_is_not_finite(tmp_path: Path, *, put_off: bool) -> None:
    job = poisoned([*write_numbers(tmp_path / "table.parquet", 100, 6), *SMALL], 4)
    session = job.session
    loop = build_loop(
        session.config, session, Collectives(World()),
        save=lambda _: None, track=lambda _: None, wants_stop=lambda: False, put_off=put_off,
    )  # fmt: skip
    with pytest.raises(TrainingFault, match=r"step 5 \(epoch 1\): the loss is nan"):
        loop.run()


def test_micro_batches_are_left_to_the_modules(tmp_path: Path) -> None:
    arguments = [*write_numbers(tmp_path / "table.parquet", ROWS, 6), "train.accumulation_steps=2"]
    assert_same(make_job(arguments, Repeater()).take(4), make_job(arguments, None).take(4))


def slow_first_layer(model: nn.Module) -> None:
    model.get_submodule("layers.0").lr_multipliers = {"weight": 0.5}  # type: ignore[assignment]


def cumulative(model: nn.Module) -> None:
    model.get_submodule("layers.1").momentum = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("more", "change"),
    [
        (["train.precision=float64"], None),
        (["model.embedding_dim=2"], None),
        (["model.hidden_dim=1026"], None),
        (["model.name=resnet"], None),
        ([], slow_first_layer),
        ([], cumulative),
    ],
)
def test_what_the_kernels_do_not_know_is_left_to_the_modules(
    tmp_path: Path, more: list[str], change: Callable[[nn.Module], None] | None
) -> None:
    arguments = write_numbers(tmp_path / "table.parquet", ROWS, 3, cities=True)
    assert make_job(arguments, Repeater()).fused is not None
    assert make_job([*arguments, *more], Repeater(), change).fused is None


@pytest.mark.parametrize("ranks", [(1, 2), pytest.param((1, 4, 8), marks=pytest.mark.slow)])
def test_the_exact_mode_is_the_same_bits_on_any_number_of_ranks(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """Four or eight slices, in the last step of an epoch of 0 or 1 row, held by as many processes."""
    arguments = [
        *write_numbers(tmp_path / "table.parquet", 43, 6), "train.global_batch_size=20", "train.ema_decay=0.9",
        f"train.virtual_ranks={4 if max(ranks) <= 4 else 8}", AS_ON_GPU,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.accel.exact_ranks", json.dumps(ranks), *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hashes = json.loads(done.stdout.splitlines()[-1])
    assert [len(hashes[str(size)]) for size in ranks] == list(ranks)
    assert len({one for of_ranks in hashes.values() for one in of_ranks}) == 1, hashes
