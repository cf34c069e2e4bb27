"""What bits depend on besides the program: the build of torch and the kind of hardware."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str]:
    """Names of what computes: `torch`, `device`, `processor`, and on a CPU `instructions`, `threads`, `numba`."""
    if device.type == "cuda":
        compute = {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    else:
        instructions, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        compute = {"device": "cpu", "instructions": instructions, "threads": str(threads), "numba": _version("numba")}
    return {"torch": torch.__version__, "processor": _processor()} | compute


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: resident on the host, or on CUDA what torch allocated there.

    Not what getrusage says: that outlives exec, so a process would report the peak of the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def mapped_memory_bytes() -> int:
    """Resident memory of this process that is pages of files; 0 where the system does not say."""
    return _status("RssFile") or 0


def _status(name: str) -> int | None:
    """A size of this process in bytes, as Linux counts it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def pin_arithmetic(device: torch.device) -> None:
    """Have torch compute the same bits every time: one thread on the CPU, deterministic kernels alone on a GPU.

    With several threads a kernel may cut its sums by the number of threads, which differs between a lone process and
    ranks that share a machine. What torch cannot do deterministically raises RuntimeError from then on.
    """
    torch.set_num_threads(1)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Else each torch.empty is filled by a kernel; nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
