"""Hashes of short runs in the exact mode and of their scores, which every processor is to meet."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from dist_train import load
from dist_train.commands.sample import TABLE
from tests.cli.in_process import command

JOB = [
    "data.path=builtin:credit_card_risk", "data.target=risk_tier", "data.split_column=split", "runtime.device=cpu",
    "wandb.mode=disabled", "train.virtual_ranks=4", "train.max_steps=30", "train.global_batch_size=250",
    "train.class_weights=balanced", "train.ema_decay=0.9", "evaluation.every_steps=15",
]  # fmt: skip
FAMILIES = {
    "financial_classifier": ("model.name=financial_classifier",),
    "tabm": ("model.name=tabm", "model.tabm.members=8", "model.tabm.width=64"),
}
GOLDEN = {
    "financial_classifier": {
        "weights_sha256": "0e2b3e3b33d17e1b09524c294b2809ede56b2e99b7e115ce53b0b2b99cba61bb",
        "scores_sha256": "3b1ba1f9a33098f89a6790964dea79b8e9f4d3ad2e8b47f8957f608aab1de8d6",
    },
    "tabm": {
        "weights_sha256": "1758a53014754b7823974a1d879f0e67b933c9fde5221b1b9feef283825656a2",
        "scores_sha256": "4e5be1a9916bf0040ecc05f7554dbd9c5be6de3caa8eb704b3adfdc86a14a019",
    },
}
"""Family -> SHA-256 of the weights and of the probabilities of the table's first 1,000 rows."""

INSTRUCTIONS = torch.backends.cpu.get_cpu_capability()


@pytest.mark.skipif(
    not torch.__version__.startswith(("2.11.", "2.13.")), reason="the hashes are of torch 2.11 and 2.13"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_and_its_scores(family: str, tmp_path: Path) -> None:
    done = command("train", *JOB, f"run.dir={tmp_path}", "run.name=run", *FAMILIES[family])
    assert done.code == 0, done.err
    scores = load(tmp_path / "run").predict_proba(pl.read_parquet(TABLE)[:1000])
    found = {
        "weights_sha256": json.loads((tmp_path / "run" / "summary.json").read_text())["weights_sha256"],
        "scores_sha256": hashlib.sha256(np.ascontiguousarray(scores).tobytes()).hexdigest(),
    }
    if found != GOLDEN[family] and INSTRUCTIONS != "AVX2":
        pytest.xfail(f"no processor with {INSTRUCTIONS} has computed these bits yet")
    assert found == GOLDEN[family]
