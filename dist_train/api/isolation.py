"""A job inside another program leaves that program's state as it was: torch's settings, generators, logging."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dist_train.system.console import log


@contextmanager
def isolated(*, verbose: bool) -> Iterator[None]:
    """Run a job inside the block; `verbose` shows its log lines on stderr, else only warnings are shown."""
    with _settings_kept(), _generators_kept(), _cuda_kept(), _shown(verbose=verbose):
        yield


@contextmanager
def _settings_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.cuda.matmul.allow_tf32 = tf32


@contextmanager
def _generators_kept() -> Iterator[None]:
    python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)


@contextmanager
def _cuda_kept() -> Iterator[None]:
    """The current device and stream: a job selects its own."""
    before = (torch.cuda.current_device(), torch.cuda.current_stream()) if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.set_device(before[0] if before else 0)
            torch.cuda.set_stream(before[1] if before else torch.cuda.default_stream())


@contextmanager
def _shown(*, verbose: bool) -> Iterator[None]:
    if not verbose:
        yield
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.handlers[:] = handlers
        log.propagate = propagate
        log.setLevel(level)
