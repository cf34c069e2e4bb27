"""Parts of the probe that measure: what the GPU can do, and what a training step takes of it and of the host."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from benchmarks import workload
from benchmarks.contestants import Ours
from dist_train.data.dataset import Dataset
from dist_train.data.encoding.encoder import Inputs
from dist_train.data.sources import MappedRows, ResidentRows
from dist_train.system.machine import pin_arithmetic
from tools.gpu.gpu_place import SETTLED, Place, Result, Trainer, eager_step, replays, show

BATCHES = (32, 256, 1024, 8192, 65536)
SHORT_BATCHES = (32, 1024)
# Rows of the batches that are compared across variants of the job.
VARIANT_ROWS = 1024
PRECISIONS_AND_MODES: Mapping[str, tuple[str, ...]] = {
    "float32": (),
    "bf16": ("train.precision=bf16",),
    "float64": ("train.precision=float64",),
    "moving average": ("train.ema_decay=0.99",),
    "exact, V = 1": ("train.virtual_ranks=1",),
    "exact, V = 8": ("train.virtual_ranks=8",),
    "two micro-batches": ("train.accumulation_steps=2",),
}


def ceilings(place: Place) -> Result:
    """Memory traffic, matrix products, and what a launch costs."""
    if not place.on_gpu:
        return {}
    figures = _copy(place) | _products(place) | _launches(place)
    start = time.perf_counter()
    for epoch in range(5):
        torch.randperm(workload.NUM_ROWS, generator=torch.Generator().manual_seed(epoch))
    figures["order_of_an_epoch_host_us"] = 1e6 * (time.perf_counter() - start) / 5
    figures["rows_of_that_epoch"] = workload.NUM_ROWS
    return figures


def _copy(place: Place) -> Result:
    a = torch.empty(2**28, device=place.device).normal_()
    b = torch.empty_like(a)
    return {"copy_GB_s": 2 * a.nbytes / place.gpu_us(lambda: b.copy_(a), 20) / 1e3}


def _products(place: Place) -> Result:
    figures: Result = {}
    x = torch.randn((8192, 8192), device=place.device)
    out = torch.empty_like(x)
    operations = 2 * 8192**3
    former = torch.get_float32_matmul_precision()
    for name, precision in (("float32", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        figures[f"{name}_TFLOP_s"] = operations / place.gpu_us(lambda: torch.mm(x, x, out=out), 3) / 1e6
    torch.set_float32_matmul_precision(former)
    half, half_out = x.bfloat16(), out.bfloat16()
    figures["bf16_TFLOP_s"] = operations / place.gpu_us(lambda: torch.mm(half, half, out=half_out), 10) / 1e6
    return figures


def _launches(place: Place) -> Result:
    figures: Result = {}
    small = torch.zeros(32, device=place.device)
    figures["launch_host_us"] = place.host_us(lambda: small.add_(1), 1000)
    for nodes in (1, 100):
        replay = place.captured(lambda nodes=nodes: [small.add_(1) for _ in range(nodes)])  # type: ignore[misc]
        figures[f"graph_of_{nodes}_gpu_us"] = place.gpu_us(replay, 200)
        figures[f"graph_of_{nodes}_host_us"] = place.host_us(replay, 200)
    figures["node_us"] = (figures["graph_of_100_gpu_us"] - figures["graph_of_1_gpu_us"]) / 99
    number = torch.zeros((), device=place.device)
    figures["read_a_number_us"] = place.wall_us(lambda: number.item(), 300)
    pinned = torch.empty(64, dtype=torch.int64, pin_memory=True)
    target = torch.empty(64, dtype=torch.int64, device=place.device)
    figures["small_copy_to_gpu_host_us"] = place.host_us(lambda: target.copy_(pinned, non_blocking=True), 1000)
    return figures


def steps(place: Place) -> Result:
    """A step at each batch size: recorded and eager, on the GPU and on the host; the training loop."""
    figures: Result = {}
    for batch in SHORT_BATCHES if place.short else BATCHES:
        place.forget()
        figures[str(batch)] = entry = _step(place, batch)
        show(f"batch {batch}", entry)
    return figures


def _step(place: Place, batch: int) -> Result:
    session = place.session(batch)
    act = Trainer(session)
    for _ in range(SETTLED):
        act()
    times = 4 if place.short else max(8, min(200, 400_000 // batch))
    entry: Result = {"recorded": bool(replays(session)), "wall_us": place.wall_us(act, times)}
    entry["host_us"] = place.host_us(act, min(times, 60))

    def read() -> None:
        result = act()
        place.alone.async_to_host(result.totals, result.grad_norm, result.finite)

    entry["host_with_numbers_us"] = place.host_us(read, min(times, 60))
    for replay in replays(session)[:1]:
        entry["gpu_us"] = place.gpu_us(replay, times)
        entry["replay_host_us"] = place.host_us(replay, min(times, 60))
        entry["eager_wall_us"] = place.wall_us(Trainer(session, eager_step(session)), max(4, times // 4))
    if place.on_gpu:
        free, total = torch.cuda.mem_get_info()
        entry["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
        entry["reserved_MiB"] = torch.cuda.max_memory_reserved() / 2**20
        entry["device_MiB_in_use"] = (total - free) / 2**20
    entry["rows_per_second"] = 1e6 * batch / entry["wall_us"]
    entry["loop_rows_per_second"] = Ours(session, place.alone)(0.05 if place.short else 0.3)
    session.close()
    return entry


def variants(place: Place) -> Result:
    """Microseconds of a step of 1,024 rows: precisions, the moving average, the exact mode, a store's feed."""
    figures: Result = {}
    times = 4 if place.short else 60
    for name, more in PRECISIONS_AND_MODES.items():
        data = in_float64(place.data) if name == "float64" else place.data
        with as_in_a_command(place, on=name.startswith("exact")):
            figures[name] = _variant(place, VARIANT_ROWS, more, data, times)
    for rows in (VARIANT_ROWS,) if place.short else (VARIANT_ROWS, 65536):
        mapped = mapped_dataset(place)
        figures[f"a store, {rows} rows"] = _variant(place, rows, (), mapped, 4 if place.short else 12)
    for name, entry in figures.items():
        show(name, entry)
    return figures


def _variant(place: Place, batch: int, more: tuple[str, ...], data: Dataset, times: int) -> Result:
    session = place.session(batch, *more, data=data)
    act = Trainer(session)
    for _ in range(SETTLED):
        act()
    entry = {"wall_us": place.wall_us(act, times), "recorded": bool(replays(session))}
    session.close()
    return entry


@contextmanager
def as_in_a_command(place: Place, *, on: bool) -> Iterator[None]:
    """The arithmetic of the exact mode, as a command switches it on."""
    if on:
        pin_arithmetic(place.device)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def in_float64(data: Dataset) -> Dataset:
    splits: dict[str, ResidentRows | MappedRows] = {}
    for name, rows in data.splits.items():
        numeric, flags, codes = rows.slice(0, len(rows))
        splits[name] = ResidentRows(Inputs(numeric.double(), flags, codes), rows.targets, rows.row_numbers)
    return Dataset(splits, data.spec, "")


def mapped_dataset(place: Place) -> Dataset:
    """The training rows on the host, as those of a store are; the device gets a batch at a time."""
    rows = place.data.splits["train"]
    numeric = rows.slice(0, len(rows))[0].cpu()
    tensors = {"numeric": numeric, "targets": rows.targets.cpu().to(torch.uint8), "rows": torch.arange(len(rows))}

    def to_inputs(tensors: Mapping[str, Tensor]) -> Inputs:
        empty = tensors["numeric"][:, :0]
        return Inputs(tensors["numeric"], empty, empty)

    mapped = MappedRows(tensors, to_inputs, place.device, torch.float32)
    return Dataset(place.data.splits | {"train": mapped}, place.data.spec, "")


def profile(place: Place) -> Result:
    """Kernels of a recorded step, by the time that they take."""
    figures: Result = {}
    for batch in SHORT_BATCHES[:1] if place.short else (32, 65536):
        session = place.session(batch)
        act = Trainer(session)
        for _ in range(SETTLED):
            act()
        for replay in replays(session)[:1]:
            place.wait()
            with torch.profiler.profile(acc_events=True) as seen:
                for _ in range(5):
                    replay()
                place.wait()
            figures[str(batch)] = _kernels(seen.events(), replayed=5, on_gpu=place.on_gpu)
        session.close()
    for name, entry in figures.items():
        print(
            f"  batch {name}: {entry['nodes']:.0f} kernels and copies, {entry['kernel_us']:,.0f} us in them", flush=True
        )
        for kernel in entry["top"][:8]:
            print(f"    {kernel['us']:8.1f} us in {kernel['times']:4.0f} x {kernel['name']}", flush=True)
    return figures


def _kernels(events: Any, *, replayed: int, on_gpu: bool) -> Result:
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels: dict[str, list[float]] = {}
    for event in events:
        if event.device_type == wanted:
            kernels.setdefault(event.name[:90], []).append(event.time_range.elapsed_us())
    ranked = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    return {
        "nodes": sum(map(len, kernels.values())) / replayed,
        "kernel_us": sum(map(sum, kernels.values())) / replayed,
        "top": [{"name": n, "times": len(t) / replayed, "us": sum(t) / replayed} for n, t in ranked[:25]],
    }


def host(place: Place) -> Result:
    """Functions of the host that the training loop spends its time in at 32 rows, each without the calls in it."""
    session = place.session(32)
    loop = Ours(session, place.alone)
    loop(0.0)
    first = session.progress.step
    profiler = cProfile.Profile()
    profiler.enable()
    loop(0.1 if place.short else 0.5)
    profiler.disable()
    times = session.progress.step - first
    session.close()
    found: Any = pstats.Stats(profiler)
    ranked = sorted(found.stats.items(), key=lambda item: -item[1][2])
    figures: Result = {"step_us": 1e6 * found.total_tt / times, "functions": []}
    for (file, line, function), (_, calls, own, *_rest) in ranked[:25]:
        name = f"{'/'.join(file.split('/')[-2:])}:{line} {function}"
        figures["functions"].append({"name": name, "calls": calls / times, "us": 1e6 * own / times})
    for entry in figures["functions"][:12]:
        print(f"    {entry['us']:8.1f} us in {entry['calls']:4.1f} x {entry['name']}", flush=True)
    return figures
