"""Rules of a configuration beyond the types of the schema: ranges, and rules between fields."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dist_train.config import families
from dist_train.config.bounds import at_least, size
from dist_train.config.schema import COLUMN_FORMS, DataConfig, JobConfig, ModelConfig, ReportConfig, TrainConfig
from dist_train.config.yaml_text import parse_argument, plain_values
from dist_train.errors import UserError

_YEAR_SECONDS = 31_536_000
HIGHER_IS_BETTER = {
    "loss": False,
    "objective": False,
    "accuracy": True,
    "balanced_accuracy": True,
    "macro_f1": True,
    "auroc": True,
    "brier": False,
    "ece": False,
}
"""Metrics of this package that `train.select_by` may name, with their direction."""


def dropout_pair(model: ModelConfig) -> tuple[float, float]:
    """The two dropout probabilities of `model.dropout`, which may be one number or two."""
    value = model.dropout
    first, second = value if isinstance(value, list) else [value, value]
    return float(first), float(second)


def given_class_weights(train: TrainConfig, class_names: Sequence[str]) -> list[float] | None:
    """A mapping in `train.class_weights` as a list in the order of the classes; None when there is no mapping.

    Raises:
        UserError: The mapping leaves out a class or names another one.
    """
    if not isinstance(train.class_weights, dict):
        return None
    given = {_class_meant(name, class_names): float(weight) for name, weight in train.class_weights.items()}
    if set(given) != set(class_names):
        raise UserError(f"train.class_weights: must have the classes {', '.join(class_names)}, has {', '.join(given)}")
    return [given[name] for name in class_names]


def named_positive_class(report: ReportConfig, class_names: Sequence[str]) -> str | None:
    """The class of `report.positive_class`; None where it names none.

    Raises:
        UserError: there is no such class.
    """
    if report.positive_class is None:
        return None
    name = _class_meant(report.positive_class, class_names)
    if name not in class_names:
        raise UserError(f"report.positive_class: there is no class {name!r}; there is {', '.join(class_names)}")
    return name


def require_columns_of_model(report: ReportConfig, columns: Sequence[str]) -> None:
    """UserError where `report.dependence` names a column that a model does not have."""
    for name in report.dependence:
        if name not in columns:
            raise UserError(f"report.dependence: {name!r} is no column of the model; there is {', '.join(columns)}")


def split_seed(config: JobConfig) -> int:
    """The seed of the split."""
    return config.run.seed if config.data.split_seed is None else config.data.split_seed


def _class_meant(name: Any, class_names: Sequence[str]) -> str:
    """The class of this name; where there is none, the one of the boolean or the number that YAML 1.1 takes it for."""
    if str(name) in class_names:
        return str(name)
    value = plain_values(parse_argument(str(name))) if isinstance(name, str) else name
    meant = str(value).lower() if isinstance(value, bool) else str(value)
    return meant if meant in class_names else str(name)


def problems_of(config: JobConfig) -> list[str]:
    """Every broken rule of a configuration, in the order of the schema; empty when there is none."""
    broken = list(_broken(config))
    named = {key for key, _ in broken}
    broken += [(key, text) for key, text in _beyond_64_bits("", asdict(config)) if not _is_named(key, named)]
    return [f"{key}: {text}" for key, text in broken]


def _is_named(key: str, named: set[str]) -> bool:
    """Whether a key is named, or the mapping that it stands in."""
    return any(key == name or key.startswith(f"{name}.") for name in named)


def _beyond_64_bits(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Whole numbers that tensors and files cannot hold."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _beyond_64_bits(f"{prefix}{name}.", value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"{prefix}{name}", f"a whole number has at most 64 bits, is {value}"


def _broken(c: JobConfig) -> Iterator[tuple[str, str]]:
    yield from _run(c)
    yield from _data(c)
    yield from _model(c.model)
    yield from _text(c)
    yield from _optim(c)
    yield from _train(c.train)
    yield from at_least("ensemble.seeds", c.ensemble.seeds, 1)
    yield from _select_by(c)
    if c.train.class_sampling and c.data.shuffle_block_rows:
        yield "train.class_sampling", "draws from all rows: data.shuffle_block_rows must be null"
    yield from at_least("evaluation.every_steps", c.evaluation.every_steps, 1)
    yield from at_least("evaluation.batch_size", c.evaluation.batch_size, 1)
    yield from at_least("report.bootstrap_repeats", c.report.bootstrap_repeats, 10)
    yield from _positive("report.false_positive_cost", c.report.false_positive_cost)
    yield from _positive("report.false_negative_cost", c.report.false_negative_cost)
    yield from at_least("checkpoint.every_steps", c.checkpoint.every_steps, 1)
    yield from at_least("checkpoint.keep", c.checkpoint.keep, 1)
    yield from at_least("log.every_steps", c.log.every_steps, 1)
    yield from _positive("runtime.timeout_seconds", c.runtime.timeout_seconds)
    if c.runtime.timeout_seconds > _YEAR_SECONDS:
        yield "runtime.timeout_seconds", f"must be at most a year, {_YEAR_SECONDS}, is {c.runtime.timeout_seconds}"
    if c.runtime.device == "cpu" and c.runtime.backend == "nccl":
        yield "runtime.backend", "nccl needs GPUs, but runtime.device is cpu: use gloo or auto"
    yield from at_least("runtime.audit_every_steps", c.runtime.audit_every_steps, 1)
    if c.runtime.audit_every_steps is not None and c.train.virtual_ranks is None:
        yield (
            "runtime.audit_every_steps",
            "only the exact mode is audited: set train.virtual_ranks, or this to null",
        )
    if c.runtime.fsdp and c.train.virtual_ranks is not None:
        yield "runtime.fsdp", "the exact mode needs all parameters on each rank: set train.virtual_ranks to null"
    if not c.wandb.project.strip():
        yield "wandb.project", "must not be empty"


def _run(c: JobConfig) -> Iterator[tuple[str, str]]:
    name = c.run.name
    if not name.strip() or name in {".", ".."} or any(s in name for s in "/\\\0"):
        yield "run.name", f"{name!r} cannot be the name of a folder"
    if not c.run.dir.strip() or "\0" in c.run.dir:
        yield "run.dir", f"{c.run.dir!r} cannot be a folder"
    if not 0 <= c.run.seed < 2**63:
        yield "run.seed", f"must be from 0 to 2**63 - 1, is {c.run.seed}"
    yield from _positive("run.time_limit_minutes", c.run.time_limit_minutes)


def _data(c: JobConfig) -> Iterator[tuple[str, str]]:
    d = c.data
    if not d.path.strip():
        yield "data.path", "must name a CSV, JSON lines or Parquet file, or builtin:credit_card_risk"
    if not d.target.strip():
        yield "data.target", "must name a column"
    if d.target in d.drop:
        yield "data.drop", f"holds the target {d.target!r}"
    if d.split_column is not None and d.split_column == d.target:
        yield "data.split_column", f"is the target {d.target!r}"
    if d.weight is not None:
        yield from _weight(d, d.weight)
    for name in sorted(set(d.drop) & set(d.categorical)):
        yield "data.categorical", f"{name!r} is in data.drop as well"
    for name, form in d.formats.items():
        # A mapping or a list in the place of a text is not refused by OmegaConf.
        if not isinstance(form, str) or form.partition(" ")[0] not in COLUMN_FORMS:
            yield "data.formats", f"{form!r} of column {name!r} is none of {', '.join(COLUMN_FORMS)}"
        if name in d.categorical or name in d.drop:
            yield "data.formats", f"{name!r} is in data.{'drop' if name in d.drop else 'categorical'} as well"
    yield from at_least("data.max_categories", d.max_categories, 1)
    yield from at_least("data.hash_buckets", d.hash_buckets, 0)
    for key, value in (("validation_fraction", d.validation_fraction), ("test_fraction", d.test_fraction)):
        if not 0 <= value < 1:
            yield f"data.{key}", f"must be at least 0 and below 1, is {value}"
    yield from _splits(d)
    if d.split_seed is not None and not 0 <= d.split_seed < 2**63:
        yield "data.split_seed", f"must be from 0 to 2**63 - 1, is {d.split_seed}"
    yield from at_least("data.shuffle_block_rows", d.shuffle_block_rows, 1)
    if d.validation_fraction < 1 and d.test_fraction < 1 and d.validation_fraction + d.test_fraction >= 1:
        yield "data.validation_fraction", "together with data.test_fraction it leaves no rows to train on"


def _text(c: JobConfig) -> Iterator[tuple[str, str]]:
    family = families.TASKS_OF_TEXT.get(c.task.name)
    if family and c.model.name != family:
        yield "model.name", f"is {c.model.name}: task.name={c.task.name} needs model.name={family}"
    elif not family and c.model.name in families.OF_TEXT:
        task = next(task for task, name in families.TASKS_OF_TEXT.items() if name == c.model.name)
        yield "model.name", f"{c.model.name} is a model of texts: it needs task.name={task}"
    t, d = c.text, c.data
    yield from at_least("text.max_tokens", t.max_tokens, 4)
    yield from at_least("text.pad_to_multiple", t.pad_to_multiple, 1)
    yield from at_least("text.sort_batches", t.sort_batches, 1)
    if not family:
        return
    # A pass has two rows or more: of three it may have to have all.
    if t.tokens_per_pass is not None and t.tokens_per_pass < 3 * t.max_tokens:
        yield (
            "text.tokens_per_pass",
            f"must be at least {3 * t.max_tokens}, three texts of text.max_tokens, is {t.tokens_per_pass}",
        )
    if not t.column.strip():
        yield "text.column", "must name a column"
    if t.column == d.target:
        yield "text.column", f"is the target {d.target!r}"
    for key in ("weight", "time_column", "group_column", "folds", "shuffle_block_rows"):
        if getattr(d, key) is not None:
            yield f"data.{key}", f"the task {c.task.name} does not have it: leave it null"
    if c.ensemble.seeds != 1:
        yield "ensemble.seeds", f"the task {c.task.name} trains one model, not {c.ensemble.seeds}"
    if c.task.name == "instruction" and c.train.label_smoothing:
        yield "train.label_smoothing", f"the task instruction has none: must be 0, is {c.train.label_smoothing}"


def _weight(d: DataConfig, name: str) -> Iterator[tuple[str, str]]:
    if not name.strip():
        yield "data.weight", "must name a column, or be null"
    others: dict[str, list[Any]] = {
        "the target": [d.target],
        "data.split_column": [d.split_column],
        "in data.drop as well": d.drop,
        "in data.categorical as well": d.categorical,
    }
    for what, names in others.items():
        if name in names:
            yield "data.weight", f"{name!r} is {what}"


def _splits(d: DataConfig) -> Iterator[tuple[str, str]]:
    for key, name in (("time_column", d.time_column), ("group_column", d.group_column)):
        if name is None:
            continue
        if name == d.target:
            yield f"data.{key}", f"is the target {name!r}"
        if name == d.weight:
            yield f"data.{key}", f"{name!r} is data.weight as well"
        if name in d.categorical:
            yield f"data.{key}", f"{name!r} is in data.categorical as well, and it is no feature"
        if d.split_column is not None:
            yield (
                f"data.{key}",
                f"data.split_column={d.split_column} says the splits already: set one of the two to null",
            )
    if d.time_column is not None and d.time_column == d.group_column:
        yield "data.group_column", f"{d.group_column!r} is data.time_column as well"
    yield from at_least("data.folds", d.folds, 2)
    if d.fold is not None and not 0 <= d.fold < (d.folds or 0):
        yield "data.fold", f"must be a fold of data.folds={d.folds}, counted from 0, is {d.fold}"


def _model(m: ModelConfig) -> Iterator[tuple[str, str]]:
    if not families.find(m.name):
        yield "model.name", families.unknown(m.name)
    block = families.block_of(m)
    if block is not m and hasattr(block, "problems"):
        try:
            yield from ((f"model.{m.name}.{key}", text) for key, text in block.problems())
        except ArithmeticError as error:
            yield f"model.{m.name}", f"a number is too large: {error}"
    yield from size("model.hidden_dim", m.hidden_dim, 2)
    yield from size("model.embedding_dim", m.embedding_dim)
    values = m.dropout if isinstance(m.dropout, list) else [m.dropout, m.dropout]
    if len(values) != 2 or not all(_is_number(v) for v in values):
        yield "model.dropout", f"must be one number or a list of two, is {m.dropout!r}"
    elif not all(0 <= v < 1 for v in values):
        yield "model.dropout", f"a probability is at least 0 and below 1, is {m.dropout!r}"


def _optim(c: JobConfig) -> Iterator[tuple[str, str]]:
    yield from _positive("optim.lr", c.optim.lr)
    if not (c.optim.weight_decay >= 0 and math.isfinite(c.optim.weight_decay)):
        yield "optim.weight_decay", f"must be finite and at least 0, is {c.optim.weight_decay}"
    if len(c.optim.betas) != 2 or not all(0 <= b < 1 for b in c.optim.betas):
        yield "optim.betas", f"must be two numbers, at least 0 and below 1, is {c.optim.betas}"
    yield from _positive("optim.eps", c.optim.eps)
    yield from _positive("optim.max_grad_norm", c.optim.max_grad_norm)
    yield from at_least("schedule.warmup_steps", c.schedule.warmup_steps, 0)
    yield from at_least("schedule.plateau_patience", c.schedule.plateau_patience, 1)
    if not 0 < c.schedule.plateau_factor < 1:
        yield "schedule.plateau_factor", f"must be above 0 and below 1, is {c.schedule.plateau_factor}"
    patience = c.train.early_stopping_patience
    if c.schedule.name == "plateau" and patience is not None and patience <= c.schedule.plateau_patience:
        yield (
            "schedule.plateau_patience",
            f"is {c.schedule.plateau_patience}: train.early_stopping_patience={patience} ends the run before the "
            "learning rate is reduced",
        )
    if not 0 <= c.schedule.min_lr_ratio <= 1:
        yield "schedule.min_lr_ratio", f"must be from 0 to 1, is {c.schedule.min_lr_ratio}"


def _train(t: TrainConfig) -> Iterator[tuple[str, str]]:
    yield from at_least("train.epochs", t.epochs, 1)
    yield from at_least("train.max_steps", t.max_steps, 1)
    yield from at_least("train.global_batch_size", t.global_batch_size, 2, "BatchNorm needs two rows")
    yield from at_least("train.accumulation_steps", t.accumulation_steps, 1)
    if t.accumulation_steps * 2 > t.global_batch_size >= 2:
        yield "train.accumulation_steps", "leaves fewer than two rows of train.global_batch_size for a pass"
    yield from at_least("train.virtual_ranks", t.virtual_ranks, 1)
    weights = t.class_weights
    if isinstance(weights, dict):
        for name, value in weights.items():
            if not (_is_number(value) and 0 < value <= sys.float_info.max):
                yield "train.class_weights", f"the weight of class {name!r} must be finite and above 0, is {value!r}"
    elif weights is not None and weights != "balanced":
        yield "train.class_weights", f"must be null, balanced or a mapping class: weight, is {weights!r}"
    if t.class_sampling not in (None, "balanced", "balanced_reweighted"):
        yield "train.class_sampling", f"must be null, balanced or balanced_reweighted, is {t.class_sampling!r}"
    if not 0 <= t.label_smoothing < 1:
        yield "train.label_smoothing", f"must be at least 0 and below 1, is {t.label_smoothing}"
    if t.ema_decay is not None and not 0 < t.ema_decay < 1:
        yield "train.ema_decay", f"must be above 0 and below 1, is {t.ema_decay}"
    yield from at_least("train.early_stopping_patience", t.early_stopping_patience, 1)


def _select_by(c: JobConfig) -> Iterator[tuple[str, str]]:
    name = c.train.select_by
    if name is not None and name not in HIGHER_IS_BETTER and name not in c.evaluation.metrics:
        known = ", ".join([*HIGHER_IS_BETTER, *c.evaluation.metrics])
        yield "train.select_by", f"there is no metric {name!r}; there is {known} (evaluation.metrics adds others)"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(key: str, value: float | None) -> Iterator[tuple[str, str]]:
    if value is not None and not (value > 0 and math.isfinite(value)):
        yield key, f"must be finite and above 0, is {value}"
