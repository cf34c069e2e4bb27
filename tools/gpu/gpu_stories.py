"""Runs of the project's commands on a GPU: kills, world sizes, replays, stores, dry runs.

    python -m tools.gpu.gpu_stories --device cuda --out stories.json [--only kill_fast,store] [--short]

Started in the root of a checkout; some stories are played at a time. Each ends in a line: what held, or what did not.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.gpu.gpu_stage import Broken, Stage, hold, same

TABLE = "dist_train/data/datasets/credit_card_risk.parquet"
SHORT = ("train.max_steps=1200", "checkpoint.every_steps=40", "log.every_steps=20", "checkpoint.keep=3")
EXACT = (
    "train.virtual_ranks=4", "train.epochs=2", "train.global_batch_size=1000", "checkpoint.every_steps=6",
    "log.every_steps=3",
)  # fmt: skip
VARIANTS: dict[str, tuple[str, ...]] = {
    "bf16": ("train.precision=bf16",),
    "float64": ("train.precision=float64",),
    "ema": ("train.ema_decay=0.99",),
    "weights": ("train.class_weights=balanced", "train.label_smoothing=0.1", "model.embedding_dim=4"),
    "micro-batches": ("train.accumulation_steps=3",),
    "wide": ("model.hidden_dim=1024", "train.global_batch_size=8192", "train.epochs=30", "train.max_steps=60"),
    "many codes": (
        "train.class_weights=balanced",
        "model.embedding_dim=4",
        "train.global_batch_size=8192",
        "train.epochs=60",
    ),
    "tail of one": ("train.global_batch_size=202",),  # of 17,979 rows
    "tabm": ("model.name=tabm",),
    "resnet": ("model.name=resnet",),
}


def kill_fast(s: Stage) -> str:
    """The fast mode: SIGKILL, and the same command again."""
    steps = 1200 if s.device == "cuda" else 400
    short = (*SHORT, f"train.max_steps={steps}")
    whole = s.train("whole", *short)
    s.killed("cut", *short, at=steps // 10, how=signal.SIGKILL)
    same(s.train("cut", *short), whole, "killed and continued")
    hold(s.lines("cut") == s.lines("whole"), "killed and continued: other lines of metrics")
    rate = whole["samples_per_second"]
    return f"{steps} steps of 256 rows, SIGKILL after a tenth: same weights, metrics, lines; {rate:,.0f} rows/s"


def kill_at_the_end_of_an_epoch(s: Stage) -> str:
    """Continued at the ragged last step of an epoch: the same bits, and as fast as the run that was not killed."""
    long = ("train.epochs=40", "checkpoint.every_steps=70", "log.every_steps=71", "evaluation.every_steps=1000000")
    whole = s.train("whole", *long)
    s.killed("cut", *long, at=70, how=signal.SIGKILL)
    step = s.last_checkpoint("cut")
    same(s.train("cut", *long), whole, f"killed at step {step} and continued")
    ours, theirs = (s.rate_of_last_lines(name) for name in ("cut", "whole"))
    hold(ours > 0.6 * theirs, f"continued at step {step}: {ours:,.0f} rows/s at the end, whole {theirs:,.0f}")
    return f"continued at step {step} of 71 an epoch: same bits; {ours:,.0f} rows/s at the end, whole {theirs:,.0f}"


def stop_fast(s: Stage) -> str:
    """The fast mode: SIGTERM, and the same command again."""
    whole = s.train("whole", *SHORT)
    s.killed("stopped", *SHORT, at=80, how=signal.SIGTERM)
    hold((s.folder / "stopped" / "requeue").is_file(), "told to stop by SIGTERM: no requeue marker")
    same(s.train("stopped", *SHORT), whole, "stopped by SIGTERM and continued")
    return "SIGTERM, saved, continued: same weights and metrics"


def exact_worlds(s: Stage) -> str:
    """The exact mode on ranks that share the GPU."""
    alone = s.train("exact1", *EXACT)
    for ranks in (2, 4):
        same(s.train(f"exact{ranks}", "runtime.backend=gloo", *EXACT, ranks=ranks), alone, f"{ranks} ranks against 1")
        hold(s.lines(f"exact{ranks}") == s.lines("exact1"), f"{ranks} ranks against 1: other lines of metrics")
    return f"V = 4 on 1, 2 and 4 ranks that share a GPU: same bits; {alone['samples_per_second']:,.0f} rows/s on one"


def exact_kill(s: Stage) -> str:
    """The exact mode, killed on one rank and continued on two."""
    whole = s.train("whole", *EXACT)
    s.killed("cut", *EXACT, at=12, how=signal.SIGKILL)
    same(s.train("cut", "runtime.backend=gloo", *EXACT, ranks=2), whole, "killed on one rank, continued on two")
    s.run("verify", s.folder / "cut")
    return "V = 4, killed on one rank, continued on two: same bits, and verify agrees on one"


def exact_tail(s: Stage) -> str:
    """The exact mode with a last batch that leaves slices empty: 3 rows for 8 slices."""
    odd = ("train.virtual_ranks=8", "train.epochs=2", "train.global_batch_size=964")  # 17,979 = 18 * 964 + 627
    few = ("train.virtual_ranks=8", "train.epochs=1", "train.global_batch_size=8988")  # 17,979 = 2 * 8,988 + 3
    for name, more in (("odd", odd), ("few", few)):
        alone = s.train(f"{name}1", *more)
        same(s.train(f"{name}2", "runtime.backend=gloo", *more, ranks=2), alone, f"{name} tail, 2 ranks against 1")
    return "V = 8 with ragged tails of 627 and of 3 rows, on 1 and 2 ranks: same bits"


def replay(s: Stage) -> str:
    """verify, evaluate and predict on a run of the fast mode."""
    summary = s.train("replayed", "train.max_steps=300", "checkpoint.every_steps=100")
    s.run("verify", s.folder / "replayed")
    s.run("verify", s.folder / "replayed", "--steps", "100:230")
    found = json.loads(s.run("evaluate", s.folder / "replayed").stdout.splitlines()[-1])["test"]
    hold(found == summary["test"], "evaluate has other test metrics than the summary")
    scores = s.folder / "scores.csv"
    s.run("predict", s.folder / "replayed", TABLE, scores)
    rows = len(scores.read_text().splitlines()) - 1
    return f"verify (all, and a part), evaluate (the summary's numbers), predict ({rows:,} rows)"


def variants(s: Stage) -> str:
    """Precisions, models, losses and batch sizes train."""
    reached = {
        name: s.train(f"variant_{number}", "train.max_steps=150", *more)["test"]["loss"]
        for number, (name, more) in enumerate(VARIANTS.items())
    }
    hold(all(0 < loss < 1.1 for loss in reached.values()), f"test losses {reached}")
    return "test loss " + ", ".join(f"{name} {loss:.3f}" for name, loss in reached.items())


def two_ranks_fast(s: Stage) -> str:
    """The fast mode on two ranks that share the GPU, beside one."""
    short = ("train.max_steps=142", "model.dropout=0", "optim.lr=1e-3")
    one = s.train("fast1", *short)
    two = s.train("fast2", "runtime.backend=gloo", *short, ranks=2)
    gap = abs(one["test"]["loss"] - two["test"]["loss"])
    hold(gap < 2e-3, f"fast mode, two epochs without dropout: test losses are {gap:.1e} apart")
    return f"DistributedDataParallel on two gloo ranks that share a GPU: test losses {gap:.1e} apart"


def store(s: Stage) -> str:
    """A store and its file train to the same bits: on a GPU a store's steps are eager."""
    s.run("prepare", TABLE, s.folder / "store", "configs/credit_risk.yaml")
    for name, more in (("fast", ("train.max_steps=150",)), ("exact", EXACT)):
        file = s.train(f"file_{name}", f"data.path={TABLE}", *more)
        stored = s.train(f"stored_{name}", f"data.path={s.folder / 'store'}", *more)
        same(stored, file, f"{name} mode, a store against its file")
    return "a store trains to the bits of its file, in both modes"


def dry_run(s: Stage) -> str:
    """What a dry run says, and what the run takes."""
    much = ("train.epochs=60", "log.every_steps=200", "evaluation.every_steps=1000000")
    report = s.run("train", *s.job("dry"), *much, "--dry-run").stderr
    happened = s.train("dry", *much)
    said_rate, said_peak = (_number(rf"{word} +about ([\d,]+)", report) for word in ("speed", "peak"))
    rate, peak = happened["samples_per_second"], happened["peak_memory_bytes"] / 2**20
    text = f"rows/s said {said_rate:,.0f}, happened {rate:,.0f} ({said_rate / rate:.2f}); "
    text += f"MiB said {said_peak:,.0f}, happened {peak:,.0f}"
    hold(abs(said_peak / peak - 1) < 0.25, text)
    hold(0.5 < said_rate / rate < 2, text)
    return text


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if not found:
        raise Broken(f"no {pattern!r} in {text[-500:]!r}")
    return float(found[1].replace(",", ""))


def not_finite(s: Stage) -> str:
    """A loss that is not finite."""
    wild = ("optim.lr=1e38", "optim.max_grad_norm=null", "schedule.warmup_steps=0")
    done = s.run("train", *s.job("wild"), *wild, code=1)
    hold("Traceback" not in done.stderr and "the loss is" in done.stderr, f"not finite: {done.stderr[-500:]}")
    return "a loss that is not finite: one line, exit code 1"


STORIES: dict[str, Callable[[Stage], str]] = {
    story.__name__: story
    for story in (
        kill_fast, exact_worlds, exact_kill, store, variants, kill_at_the_end_of_an_epoch, exact_tail, dry_run, replay,
        two_ranks_fast, stop_fast, not_finite,
    )
}  # fmt: skip
SHORT_STORIES = ("kill_fast",)


def play(name: str, device: str) -> dict[str, Any]:
    """How a story ended: `held`, `said`, `seconds`, and `warnings` of its commands."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), device)
        try:
            held, said = True, STORIES[name](stage)
        except Broken as broken:
            held, said = False, str(broken)
        except Exception as error:
            held, said = False, f"{type(error).__name__}: {str(error)[:800]}"
    seconds = round(time.perf_counter() - start, 1)
    print(f"{'held ' if held else 'BROKE'} {name} ({seconds} s): {said}", flush=True)
    return {"held": held, "said": said, "seconds": seconds, "warnings": stage.warnings}


def main() -> None:
    """Play stories; exit code 1 where one did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON file to write, anew after each story")
    parser.add_argument("--only", default="", help=f"of {', '.join(STORIES)}")
    parser.add_argument("--at-once", type=int, default=6, help="stories at a time (default: 6)")
    parser.add_argument("--short", action="store_true", help=f"{', '.join(SHORT_STORIES)} alone")
    arguments = parser.parse_args()
    chosen = [name for name in arguments.only.split(",") if name]
    chosen = chosen or list(SHORT_STORIES if arguments.short else STORIES)
    unknown = [name for name in chosen if name not in STORIES]
    if unknown:
        parser.error(f"there is no story {unknown[0]}, but {', '.join(STORIES)}")
    results: dict[str, dict[str, Any]] = {}

    def played(name: str) -> None:
        results[name] = play(name, arguments.device)
        if arguments.out:
            arguments.out.write_text(json.dumps(dict(results), indent=1))

    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(played, chosen))
    sys.exit(not all(result["held"] for result in results.values()))


if __name__ == "__main__":
    main()
