"""What bits depend on besides the program: the build of torch and the kind of hardware."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str]:
    """Names of what computes: `torch`, `device`, `processor`, `instructions`, `threads`."""
    if device.type == "cuda":
        compute = {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    else:
        instructions, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        compute = {"device": "cpu", "instructions": instructions, "threads": str(threads)}
    return {"torch": torch.__version__, "processor": _processor()} | compute


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: resident memory, or of the GPU what torch has allocated.

    On Linux not getrusage's maximum, which a process takes over from the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def pin_arithmetic(device: torch.device) -> None:
    """Have torch compute the same bits every time: one thread on the CPU, deterministic kernels alone on a GPU.

    With several threads a kernel may cut its sums by the number of threads, which differs between a lone process and
    ranks that share a machine. What torch cannot do deterministically raises RuntimeError from then on.
    """
    torch.set_num_threads(1)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = False


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
