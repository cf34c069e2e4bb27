"""The runs that an ensemble is made of: a configuration each, in a run folder below that of the ensemble."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from dist_train.config.rules import split_seed
from dist_train.config.schema import JobConfig


@dataclass(frozen=True)
class MemberRun:
    """A run of an ensemble. `name` is that of its run folder."""

    name: str
    config: JobConfig


def members_of(config: JobConfig) -> list[MemberRun]:
    """The runs of an ensemble in their order, fold by fold; none where the configuration is that of one run.

    Seed `i` of a member is `run.seed + i`; all members have the split of the first.
    """
    folds = range(config.data.folds) if config.data.folds is not None and config.data.fold is None else [None]
    seeds = range(config.ensemble.seeds)
    if len(folds) * len(seeds) == 1:
        return []
    return [_member(config, fold, seed, several_seeds=len(seeds) > 1) for fold in folds for seed in seeds]


def is_ensemble(config: JobConfig) -> bool:
    """Whether a configuration trains several runs that become one model."""
    return bool(members_of(config))


def _member(config: JobConfig, fold: int | None, seed: int, *, several_seeds: bool) -> MemberRun:
    names = [] if fold is None else [f"fold_{fold}"]
    name = "_".join([*names, *([f"seed_{seed}"] if several_seeds else [])])
    folder = str(Path(config.run.dir) / config.run.name)
    run = replace(config.run, dir=folder, name=name, seed=config.run.seed + seed)
    data = config.data if fold is None else replace(config.data, fold=fold)
    if seed:
        data = replace(data, split_seed=split_seed(config))
    return MemberRun(name, replace(config, run=run, data=data, ensemble=replace(config.ensemble, seeds=1)))
