"""Tests that spend their time on waiting for Slurm, begun all together on one cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster

AT_A_TIME = 6


@dataclass(frozen=True)
class Stage:
    """What a story plays on: the cluster, a table, a run folder of its own, and the answer of the uninterrupted run."""

    cluster: Cluster
    table: Path
    run_dir: Path
    whole: dict[str, Any]

    def named(self, name: str) -> Stage:
        """The same with a run folder of this name, for a story of several jobs."""
        return replace(self, run_dir=self.run_dir / name)


Story = Callable[[Stage], None]


def side_by_side(story: Story) -> Callable[[Stories], None]:
    """Make a test of a story. The stories of all tests that were asked for begin before the first of them is judged."""

    def test(stories: Stories) -> None:
        stories.judge(story)

    test.__name__, test.__doc__, test.__module__ = story.__name__, story.__doc__, story.__module__
    test.story = story  # type: ignore[attr-defined]
    return test


class Stories:
    """Stories under way."""

    def __init__(self, items: Iterable[pytest.Item], stage: Callable[[str], Stage]) -> None:
        self._pool = ThreadPoolExecutor(AT_A_TIME)
        self._ends: dict[Story, Future[None]] = {}
        functions = (getattr(item, "function", None) for item in items)
        for story in filter(None, (getattr(function, "story", None) for function in functions)):
            self._ends[story] = self._pool.submit(story, stage(story.__name__))

    def judge(self, story: Story) -> None:
        """Wait for the end of a story; raises what it raised."""
        self._ends[story].result()

    def close(self) -> None:
        """Begin no more; those under way fail with the end of their cluster."""
        self._pool.shutdown(wait=False, cancel_futures=True)
