"""An exported model beside the predictor of its run: the largest difference, rows per second, time of one row.

    python launch/export.py runs/credit_risk credit_risk.onnx
    python -m benchmarks.exported runs/credit_risk credit_risk.onnx

Rows are made of the columns that the model knows: numbers of every size, missing cells, known and unknown categories.
Both read a data frame and compute on one thread, in turns. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import polars as pl
import torch

from benchmarks.report import take_turns
from dist_train import load
from dist_train.serving.export import sample_rows

SINGLE_ROWS = 200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(arguments.model, options)
    predictor = load(arguments.run)
    rows = sample_rows(predictor.members[0].task.spec, arguments.rows)  # type: ignore[attr-defined]
    contestants: dict[str, Callable[[pl.DataFrame], Any]] = {
        "predictor": predictor.predict_proba,
        "onnxruntime": lambda frame: session.run(["probabilities"], inputs_of(session, frame))[0],
    }
    ours, theirs = (np.asarray(score(rows)) for score in contestants.values())
    found: dict[str, Any] = {"rows": len(rows), "largest_difference": float(np.abs(ours - theirs).max())}
    of_all = {name: lambda score=score: _seconds(score, rows) for name, score in contestants.items()}
    of_one = {name: lambda score=score: _of_single_rows(score, rows) for name, score in contestants.items()}
    for name, values in take_turns(of_all, arguments.rounds).items():
        found[f"{name}_rows_per_second"] = round(len(rows) / statistics.median(values))
    for name, values in take_turns(of_one, arguments.rounds).items():
        found[f"{name}_milliseconds_of_a_row"] = round(1e3 * statistics.median(values), 3)
    print(json.dumps(found))


def inputs_of(session: onnxruntime.InferenceSession, frame: pl.DataFrame) -> dict[str, Any]:
    """The columns of a frame as the session takes them: numbers as float64, texts as objects."""
    return {
        value.name: frame[value.name].to_numpy()[:, None].astype(np.float64)
        if value.type == "tensor(double)"
        else np.array(frame[value.name].to_list(), object)[:, None]
        for value in session.get_inputs()
    }


def _seconds(score: Callable[[pl.DataFrame], Any], rows: pl.DataFrame) -> float:
    start = time.perf_counter()
    score(rows)
    return time.perf_counter() - start


def _of_single_rows(score: Callable[[pl.DataFrame], Any], rows: pl.DataFrame) -> float:
    """The median over single rows."""
    return statistics.median(_seconds(score, rows[place]) for place in range(min(SINGLE_ROWS, len(rows))))


if __name__ == "__main__":
    main()
