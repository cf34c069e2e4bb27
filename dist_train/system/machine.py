"""What bits depend on besides the program: the build of torch and the kind of hardware."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_DRIVER = Path("/proc/driver/nvidia/version")


def describe_machine(device: torch.device) -> dict[str, str]:
    """Names of what computes: `torch`, `device`, `processor`, on a CPU `instructions`, `threads` and `numba`.

    On a GPU the versions of `cuda`, `cublas`, `cudnn`, `nccl` and of the `driver`.
    """
    if device.type == "cuda":
        compute = {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda), **_gpu_libraries()}
    else:
        instructions, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        compute = {"device": "cpu", "instructions": instructions, "threads": str(threads), "numba": _version("numba")}
    return {"torch": torch.__version__, "processor": _processor()} | compute


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held: resident on the host, or on CUDA on its device.

    There it is the most that torch has reserved, and all that the device has given out besides: CUDA's context, NCCL,
    and what other processes hold.

    On the host it is not what getrusage says: that outlives exec, so a process would report the peak of the one that
    started it.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        besides = total - free - torch.cuda.memory_reserved(device)
        return torch.cuda.max_memory_reserved(device) + max(0, besides)
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
    use_deterministic_kernels(device, strict=True)


def use_deterministic_kernels(device: torch.device, *, strict: bool) -> None:
    """Have a GPU take kernels that compute the same bits every time, so that a run is the same after a kill.

    An embedding of few categories, for one, else adds up its gradient by atomics, in the order in which threads come.
    What torch cannot do deterministically raises RuntimeError if `strict`, else it warns. A CPU needs nothing.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    # Else each torch.empty is filled by a kernel; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False


def use_one_thread_for_tokens() -> None:
    """Have the tokenizers library work in one thread, unless the environment says otherwise: ranks share a machine."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _gpu_libraries() -> dict[str, str]:
    """Versions of what computes and communicates on a GPU; "unknown" where one does not say."""
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return {
        "cublas": _cublas_version() or "unknown",
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, nccl)) or "unknown",
        "driver": _driver_version() or "unknown",
    }


def _cublas_version() -> str | None:
    """Of the library that torch has loaded."""
    major = str(torch.version.cuda).partition(".")[0]
    try:
        library = ctypes.CDLL(f"libcublas.so.{major}")
        number = ctypes.c_int()
        parts = []
        for kind in range(3):  # libraryPropertyType: MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL
            if library.cublasGetProperty(kind, ctypes.byref(number)) != 0:
                return None
            parts.append(str(number.value))
    except (OSError, AttributeError):
        return None
    return ".".join(parts)


def _driver_version() -> str | None:
    """Of the kernel module, as Linux shows it."""
    try:
        text = _DRIVER.read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module[^\n]*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else None


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
