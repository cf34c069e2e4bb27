"""What is said of a machine with a GPU, from what torch says of it; no GPU is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.system import machine
from dist_train.system.machine import describe_machine, peak_memory_bytes, pin_arithmetic, use_deterministic_kernels

GPU = torch.device("cuda", 0)
DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (user@host)\nGCC 12\n"


def test_all_that_a_gpus_bits_depend_on_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text(DRIVER)
    monkeypatch.setattr(machine, "_DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(machine, "_cublas_version", lambda: "13.1.0")
    found = describe_machine(GPU)
    expected = {"device": "a GPU", "cublas": "13.1.0", "cudnn": "91002", "nccl": "2.28.9", "driver": "580.65.06"}
    assert {name: found[name] for name in expected} == expected
    assert {"torch", "processor", "cuda"} <= found.keys()


def test_what_does_not_say_its_version_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    found = describe_machine(GPU)
    assert [found[name] for name in ("cublas", "nccl", "driver")] == ["unknown"] * 3


class Cublas:
    """The library, which answers through a pointer."""

    def cublasGetProperty(self, kind: int, answer: Any) -> int:  # noqa: N802
        answer._obj.value = (13, 1, 0)[kind]
        return 0


def test_cublas_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: asked.append(name) or Cublas())
    assert machine._cublas_version() == "13.1.0"
    assert asked == ["libcublas.so.13"]


def test_memory_of_a_gpu_is_what_torch_reserves_and_what_is_gone_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7000 * mib, 8000 * mib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 400 * mib)  # 600 are CUDA's context and NCCL's
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 900 * mib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 100 * mib)
    assert peak_memory_bytes(GPU) == 1500 * mib


@pytest.mark.parametrize("strict", [True, False])
def test_deterministic_kernels_are_not_paid_with_a_fill_of_all_memory(
    monkeypatch: pytest.MonkeyPatch, *, strict: bool
) -> None:
    """What torch cannot do deterministically is refused in the exact mode, and in the fast mode a warning."""
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        if strict:
            pin_arithmetic(GPU)
        else:
            use_deterministic_kernels(GPU, strict=False)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is not strict
        assert torch.utils.deterministic.fill_uninitialized_memory is False  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
