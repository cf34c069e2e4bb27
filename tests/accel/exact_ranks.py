"""Print the hash of what some steps of the exact mode leave, on each rank of jobs of some sizes: {size: [hash, ...]}.

A program of its own: the processes of tests.ranks must have loaded Triton with its interpreter.
"""

from __future__ import annotations

import hashlib
import json
import sys

from dist_train.distributed.collectives import Collectives
from tests.accel.interpreted import INTERPRETED, make_job
from tests.execution.test_recorded import Repeater
from tests.ranks import on_ranks

STEPS = 3


def hash_of_steps(collectives: Collectives, arguments: list[str]) -> str:
    """SHA-256 of results, weights, statistics, moments and moving average."""
    assert INTERPRETED
    job = make_job(arguments, Repeater(), collectives=collectives)
    assert job.fused is not None
    digest = hashlib.sha256(json.dumps(job.take(STEPS).results).encode())
    for value in job.state.values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sizes, *arguments = sys.argv[1:]
    print(json.dumps({size: on_ranks(size, hash_of_steps, arguments) for size in json.loads(sizes)}))
