"""The job that all contestants train: data, model, loss, optimizer, schedule, and this project's configuration of it.

FinancialClassifier 50 -> 256 -> 128 -> 3 with dropout 0.3 and 0.2, cross-entropy, gradients clipped to norm 1, AdamW
with a cosine schedule, float32. The rows are made by a keyed generator, and their number is a multiple of every batch
size, so that no contestant has a ragged tail.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from dist_train.config.load import load_config
from dist_train.config.schema import JobConfig
from dist_train.data.dataset import Dataset
from dist_train.data.encoding.encoder import Inputs
from dist_train.data.encoding.spec import FeatureSpec, NumericColumn
from dist_train.data.sources import resident
from dist_train.determinism.keyed_random import derive, seeded
from dist_train.models.financial_classifier import FinancialClassifier

NUM_FEATURES, HIDDEN, NUM_CLASSES = 50, 256, 3
DROPOUT = (0.3, 0.2)
NUM_ROWS = 4 * 65536
BATCH_SIZES = (32, 256, 1024, 8192, 65536)
LEARNING_RATE, MAX_GRAD_NORM = 1e-3, 1.0
TOTAL_STEPS = 1_000_000  # of the schedule; nobody gets there
NEVER = 10**9
LAYERS = ((NUM_FEATURES, HIDDEN), (HIDDEN, HIDDEN // 2), (HIDDEN // 2, NUM_CLASSES))
CLASS_NAMES = ["high", "low", "mid"]


def flops_per_row() -> int:
    """Of the matrix products of a forward and a backward pass.

    A product of a row with an (inputs, outputs) matrix is 2 * inputs * outputs; each layer has three of them (output,
    gradient of its weights, gradient of its inputs), but nobody wants the gradient of the first layer's inputs.
    """
    return 6 * sum(inputs * outputs for inputs, outputs in LAYERS) - 2 * LAYERS[0][0] * LAYERS[0][1]


def rows_and_targets(num_rows: int, key: str = "train") -> tuple[Tensor, Tensor]:
    """Features (rows, 50) float32, and classes (rows,) that they bear on."""
    generator = torch.Generator().manual_seed(derive("benchmark rows", key))
    features = torch.randn((num_rows, NUM_FEATURES), generator=generator)
    teacher = torch.Generator().manual_seed(derive("benchmark teacher"))
    scores = features @ torch.randn((NUM_FEATURES, NUM_CLASSES), generator=teacher) / 4
    return features, (scores + torch.randn(scores.shape, generator=generator)).argmax(1)


def model() -> FinancialClassifier:
    """The network with plain torch modules and initial weights of its own key."""
    with seeded("benchmark weights"):
        return FinancialClassifier(NUM_FEATURES, HIDDEN, NUM_CLASSES, DROPOUT)


def dataset(num_rows: int, device: torch.device) -> Dataset:
    """The rows as this project holds them: training rows, a quarter as many to validate, as many again to test."""
    numeric = [NumericColumn(name=f"x{i}", median=0.0, scale=1.0, has_missing_flag=False) for i in range(NUM_FEATURES)]
    spec = FeatureSpec(numeric=tuple(numeric), categorical=(), class_names=tuple(CLASS_NAMES))
    splits = {}
    for name, count in (("train", num_rows), ("valid", num_rows // 4), ("test", num_rows // 4)):
        features, targets = rows_and_targets(count, name)
        empty = torch.empty((count, 0), dtype=torch.uint8)
        inputs = Inputs(features, empty, empty)
        splits[name] = resident(inputs, targets, torch.arange(count), NUM_CLASSES, device, torch.float32)
    return Dataset(splits, spec, "")


def write_table(file: Path, num_rows: int) -> list[str]:
    """The same rows as a Parquet file; the arguments that train on it."""
    frames = []
    for name, count in (("train", num_rows), ("valid", num_rows // 4), ("test", num_rows // 4)):
        features, targets = rows_and_targets(count, name)
        columns = {f"x{i}": features[:, i].numpy() for i in range(NUM_FEATURES)}
        frame = pl.DataFrame(columns).with_columns(
            pl.Series("risk", [CLASS_NAMES[t] for t in targets.tolist()]), pl.lit(name).alias("split")
        )
        frames.append(frame)
    pl.concat(frames).write_parquet(file)
    return [f"data.path={file}", "data.target=risk", "data.split_column=split"]


def configuration(batch_size: int, *more: str) -> JobConfig:
    """This project's job, with nothing in it that the peers do not do: no evaluations, no checkpoints."""
    return load_config(
        [
            f"train.global_batch_size={batch_size}", f"train.epochs={TOTAL_STEPS}", f"train.max_steps={TOTAL_STEPS}",
            f"model.hidden_dim={HIDDEN}", f"optim.lr={LEARNING_RATE}", f"optim.max_grad_norm={MAX_GRAD_NORM}",
            f"evaluation.every_steps={NEVER}", f"checkpoint.every_steps={NEVER}", *more,
        ]
    )  # fmt: skip
