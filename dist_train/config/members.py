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
    """The runs of an ensemble in their order; none where the configuration is that of one run.

    Seed `i` of a member is `run.seed + i`; all members have the split of the first.
    """
    seeds = range(config.ensemble.seeds)
    if len(seeds) == 1:
        return []
    return [MemberRun(f"seed_{index}", _member(config, f"seed_{index}", index)) for index in seeds]


def is_ensemble(config: JobConfig) -> bool:
    """Whether a configuration trains several runs that become one model."""
    return bool(members_of(config))


def _member(config: JobConfig, name: str, seed: int) -> JobConfig:
    run = replace(config.run, dir=str(Path(config.run.dir) / config.run.name), name=name, seed=config.run.seed + seed)
    data = replace(config.data, split_seed=split_seed(config)) if seed else config.data
    return replace(config, run=run, data=data, ensemble=replace(config.ensemble, seeds=1))
