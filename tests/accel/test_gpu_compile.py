"""The kernels of a GPU's step compile for compute capability 9.0, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

MOST_SHARED_BYTES = 232448  # of a block on compute capability 9.0
KERNELS = 10
"""Of a step; an eleventh where the second layer's backward pass is two, and one that reads the weights before."""


# In a process of its own: here Triton may have been loaded with its interpreter.
@pytest.mark.parametrize("rows", [2048, *(pytest.param(size, marks=pytest.mark.slow) for size in (16384, 65536))])
@pytest.mark.parametrize(("hidden", "classes"), [(256, 3), pytest.param(1024, 64, marks=pytest.mark.slow, id="widest")])
def test_the_kernels_compile_and_fit_into_shared_memory(rows: int, hidden: int, classes: int) -> None:
    sizes = [str(rows), "--hidden", str(hidden), "--classes", str(classes)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.accel.compiled_kernels", *sizes],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    kernels = [line for line in done.stdout.splitlines() if "`" in line]
    assert len({line.split("`")[1] for line in kernels}) == KERNELS
    assert all(int(line.split("|")[7].replace(",", "")) <= MOST_SHARED_BYTES for line in kernels)
