"""What must hold where there is a GPU: the numbers of the CPU. Skipped, with the reason, where there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train.data.encoding.encoder import Inputs
from dist_train.data.sampler import MicroBatchIndices
from dist_train.data.sources import MappedRows
from dist_train.determinism.dropout import KeyedDropout
from dist_train.determinism.keyed_random import seeded
from dist_train.distributed.collectives import Collectives
from dist_train.distributed.world import World, process_group
from dist_train.training.evaluation import evaluate
from tests.commands import REPOSITORY, train
from tests.determinism.contexts import context_at
from tests.dist.sessions import BUILTIN, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda sees no GPU on this machine"),
]


def on(device: str) -> Collectives:
    return Collectives(World(device=torch.device(device)))


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """TensorFloat-32 would round matrix products to 10 bits."""
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(former)


def losses(device: str, *more: str, steps: int = 20) -> list[float]:
    session = build(on(device), [*BUILTIN, *more])
    found: list[float] = []
    for batches, _ in session.feed.steps(session.progress.position):
        outcome = session.step(batches, len(found), wants_stop=False)
        assert bool(outcome.finite)
        found.append((outcome.totals[0] / outcome.totals[1]).item())
        if len(found) == steps:
            return found
    raise AssertionError("a feed has no end")


@pytest.mark.parametrize(
    "more",
    [
        ["model.dropout=0"],
        [],  # dropout on: the masks are the same bits on every device
        ["train.class_weights=balanced", "train.label_smoothing=0.1", "model.embedding_dim=4", "train.ema_decay=0.9"],
        ["train.accumulation_steps=3"],
    ],
)
def test_training_equals_the_cpu(more: list[str]) -> None:
    np.testing.assert_allclose(losses("cuda", *more), losses("cpu", *more), rtol=0, atol=1e-4)


def test_the_moving_average_equals_the_cpus() -> None:
    """On a GPU its weights are computed on the device."""
    averages = []
    for device in ("cuda", "cpu"):
        session = build(on(device), [*BUILTIN, "train.ema_decay=0.9"])
        feed = session.feed.steps(session.progress.position)
        for number in range(20):
            assert session.step(next(feed)[0], number, wants_stop=False).finite
        assert session.average is not None
        averages.append(session.average.state_dict())
    assert averages[0]["n_averaged"].item() == averages[1]["n_averaged"].item() == 20
    for name, value in averages[1].items():
        torch.testing.assert_close(averages[0][name].cpu(), value, rtol=1e-3, atol=1e-4)


def test_bfloat16_trains() -> None:
    half = losses("cuda", "train.precision=bf16", steps=60)
    full = losses("cuda", steps=60)
    assert half[-1] < 0.9 * half[0]
    np.testing.assert_allclose(half, full, rtol=0, atol=0.1)


@pytest.mark.parametrize("width", [1, 7, 384])
def test_dropout_bits_are_the_same_on_both_devices(width: int) -> None:
    masks = []
    for device in ("cpu", "cuda"):
        like = torch.empty(0, device=device)
        bits = context_at(4, 5_000_000_000, seed=3).bits16("layer", 257, width, like)
        layer = KeyedDropout(0.3, "layer", context_at(4, 12345, seed=3))
        masks.append((bits.cpu(), layer(torch.ones(257, width, device=device)).cpu()))
    assert torch.equal(masks[0][0], masks[1][0])
    assert torch.equal(masks[0][1], masks[1][1])


def test_building_a_model_leaves_the_gpus_generator_alone() -> None:
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    with seeded("weights", 1):
        torch.randn(3)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_evaluation_equals_the_cpu() -> None:
    scores = []
    for device in ("cpu", "cuda"):
        collectives = on(device)
        session = build(collectives, BUILTIN)
        metrics = evaluate(session.scored, session.task.splits["test"], session.task, 2048, collectives)
        assert metrics is not None
        scores.append(metrics)
    for name in ("loss", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "brier"):
        assert scores[1][name] == pytest.approx(scores[0][name], abs=1e-5), name
    # A probability near the edge of a bin may fall to its other side: a row's worth in 5993.
    assert scores[1]["ece"] == pytest.approx(scores[0]["ece"], abs=1e-3)


def test_a_step_that_is_not_finite_updates_nothing() -> None:
    session = build(on("cuda"), BUILTIN)
    batches, _ = next(iter(session.feed.steps(session.progress.position)))
    session.step(batches, 0, wants_stop=False)
    before = [p.detach().clone() for p in session.model.parameters()]
    rows: Any = session.task.splits["train"]
    rows.inputs[0][batches[0].index[0]] = torch.nan
    assert not session.step(batches, 1, wants_stop=False).finite
    assert all(torch.equal(p, q) for p, q in zip(session.model.parameters(), before, strict=True))


def one_gpu_world(tmp_path: Path) -> World:
    return World(rank=0, size=1, device=torch.device("cuda", 0), backend="nccl", rendezvous=f"file://{tmp_path}/store")


def test_the_exact_mode_is_the_same_bits_on_one_rank_and_on_several_that_share_a_gpu(tmp_path: Path) -> None:
    """Alone its step is recorded; ranks that share a GPU sum by gloo, over the host, and are eager."""
    exact = [
        str(REPOSITORY / "configs" / "credit_risk.yaml"),
        "train.virtual_ranks=4",
        "train.epochs=1",
        "train.global_batch_size=600",
        "train.ema_decay=0.9",
        "runtime.device=cuda",
    ]
    alone = train(tmp_path / "alone", *exact)
    for ranks in (2, 4):
        shared = train(tmp_path / str(ranks), *exact, "runtime.backend=gloo", ranks=ranks)
        assert shared["weights_sha256"] == alone["weights_sha256"]
        assert shared["test"] == alone["test"]


def test_a_world_of_one_needs_no_process_group(tmp_path: Path) -> None:
    with process_group(one_gpu_world(tmp_path), 10):
        assert not torch.distributed.is_initialized()
        assert torch.cuda.current_device() == 0


def test_batches_of_a_store_arrive_whole_by_way_of_pinned_memory() -> None:
    """More batches than buffers, of changing sizes, compared only after all of them were sent off."""
    count = 5000
    numeric = torch.arange(count * 50, dtype=torch.float32).view(count, 50)
    codes, targets = torch.arange(count * 3).view(count, 3).to(torch.int32), (torch.arange(count) % 7).to(torch.uint8)
    tensors = {"numeric": numeric, "codes": codes, "targets": targets, "rows": torch.arange(count) * 2}

    def to_inputs(tensors: Mapping[str, torch.Tensor]) -> Inputs:
        return Inputs(tensors["numeric"], tensors["codes"][:, :0], tensors["codes"])

    rows = MappedRows(tensors, to_inputs, torch.device("cuda"), torch.float64)
    generator = torch.Generator().manual_seed(0)
    shares = [
        MicroBatchIndices(torch.randperm(count, generator=generator)[:n], (n,), 0, 0, n)
        for n in (900, 7, 4000, 0, 900) * 8
    ]
    batches = [rows.gather(share) for share in shares]
    sent = [(batch.inputs, batch.targets) for batch in batches]  # a batch is read when it is looked at
    for share, batch, (inputs, found) in zip(shares, batches, sent, strict=True):
        assert torch.equal(inputs[0].cpu(), numeric[share.rows].double())
        assert torch.equal(inputs[2].cpu(), codes[share.rows])
        assert torch.equal(found.cpu(), targets[share.rows].long())
        assert batch.rows.tolist() == (share.rows * 2).tolist()
    assert rows.slice(3, 5)[0].device.type == "cuda"
    assert torch.equal(rows.targets.cpu(), targets.long())
