"""For all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dist_train.system.machine import use_deterministic_kernels
from tests.gpu.graphs import DEVICE


@pytest.fixture(autouse=True)
def _deterministic_kernels() -> Iterator[None]:
    """As a job has them, in the fast mode too: sessions that are built without a job would take others."""
    use_deterministic_kernels(DEVICE, strict=False)
    yield
    torch.use_deterministic_algorithms(False)
