"""Train and score a job as on other processors, on several ranks and threads; say where its bits differ.

python -m tests.same_bits.matrix [--family tabm] [--batches 1000 4096] [--steps 200] [--as NAME ...]

Switches that make the libraries compute as on another processor stand in for it. A line for each run: hashes of its
weights, of the lines of its metrics.jsonl without their times, and of the probabilities of 1,000 rows; a star where one
differs from that of the first run of the batch. Exit code 1 where there is a star.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch

from dist_train import load
from dist_train.commands.sample import TABLE
from tests.resume.jobs import finish

HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+sse4.2"}
AVX2 = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"} | HASWELL
# Of MKL, torch, numba, numpy, its BLAS and the C library.
SSE42 = {
    "MKL_CBWR": "COMPATIBLE",  # MKL_ENABLE_INSTRUCTIONS changes nothing on a processor of AMD
    "ATEN_CPU_CAPABILITY": "default",
    "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "+sse4.2",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4",
    "OPENBLAS_CORETYPE": "Nehalem",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX,-AVX2,-FMA,-FMA4,-AVX2_Usable,-FMA_Usable,-AVX_Fast_Unaligned_Load",
}
PROCESSORS: dict[str, dict[str, str]] = {
    "native": {},
    "MKL AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "torch AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "numba haswell": HASWELL,
    "all AVX2": AVX2,
    "MKL compatible": {"MKL_CBWR": "COMPATIBLE"},
    "SSE4.2": SSE42,
}
FAMILIES = {
    "financial_classifier": ("model.name=financial_classifier",),
    "tabm": (
        "model.name=tabm", "model.tabm.members=8", "model.tabm.width=64",
        "model.tabm.numeric_embedding=piecewise_linear",
    ),
}  # fmt: skip
JOB = (
    "data.path=builtin:credit_card_risk", "data.target=risk_tier", "data.split_column=split", "runtime.device=cpu",
    "wandb.mode=disabled", "train.virtual_ranks=4", "train.class_weights=balanced", "train.label_smoothing=0.05",
    "train.ema_decay=0.9", "log.every_steps=1", "train.epochs=1000",
)  # fmt: skip
_TIMES = ("samples_per_second",)
_SCORED = 1000


Hashes = dict[str, str]


def bits_of(folder: Path, more: tuple[str, ...], ranks: int, threads: int) -> Hashes:
    """Hashes of a run in this process's libraries: of its weights, its lines, and its scores."""
    torch.set_num_threads(threads)
    finish([JOB[0], f"run.dir={folder}", "run.name=run", *JOB[1:], *more], ranks, threads)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]
    scores = np.ascontiguousarray(load(folder / "run").predict_proba(pl.read_parquet(TABLE)[:_SCORED]))
    return {
        "weights": summary["weights_sha256"],
        "lines": hashlib.sha256(json.dumps([kept, summary["test"]]).encode()).hexdigest(),
        "scores": hashlib.sha256(scores.tobytes()).hexdigest(),
    }


def here(options: argparse.Namespace) -> None:
    """A JSON line for each run in this process's libraries."""
    for batch in options.batches:
        more = (
            *FAMILIES[options.family], f"train.global_batch_size={batch}", f"train.max_steps={options.steps}",
            f"evaluation.every_steps={max(1, options.steps // 2)}",
        )  # fmt: skip
        for ranks in options.ranks:
            for threads in options.threads:
                began = time.monotonic()
                with tempfile.TemporaryDirectory() as folder:
                    found = bits_of(Path(folder), more, ranks, threads)
                seconds = f"{time.monotonic() - began:.0f} s"
                place = {"batch": batch, "ranks": ranks, "threads": threads}
                print(json.dumps([place, found, seconds]), flush=True)


def main() -> int:
    """Print the table; 1 where bits differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="financial_classifier")
    parser.add_argument("--batches", type=int, nargs="+", default=[1000, 4096])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--as", dest="processors", nargs="+", choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        here(options)
        return 0
    expected: dict[int, Hashes] = {}
    runs = differing = 0
    for processor in options.processors:
        command = [sys.executable, "-m", "tests.same_bits.matrix", "--here", *sys.argv[1:]]
        with subprocess.Popen(
            command,
            env=os.environ | PROCESSORS[processor] | {"DIST_TRAIN_TEST_PATIENCE": "7200"},
            stdout=subprocess.PIPE,
            text=True,
        ) as inner:
            assert inner.stdout is not None
            for line in inner.stdout:
                place, found, seconds = json.loads(line)
                first = expected.setdefault(place["batch"], found)
                runs, differing = runs + 1, differing + (found != first)
                hashes = "  ".join(f"{k} {v[:12]}{'' if v == first[k] else '*'}" for k, v in found.items())
                where = "  ".join(f"{name} {value}" for name, value in place.items())
                print(f"{processor:15} {where}  {hashes}  {seconds}", flush=True)
        if inner.returncode:
            return inner.returncode
    print(f"{runs} runs, of which {differing} differ from the first one of their batch")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
