"""Compile the kernels of a GPU's step for compute capability 9.0, without a GPU: what each takes of a processor.

    python -m tests.accel.compiled_kernels [ROWS ...] [--hidden UNITS] [--classes CLASSES]

For each number of rows (of all ranks; 2048, 16384 and 65536 unless given) the kernels that a step of
FinancialClassifier with 50 inputs launches, as a table in Markdown. Unless given otherwise it has 256 and 128 units and
3 classes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_train.accel import gpu_layers, gpu_network, gpu_sums
from dist_train.determinism.batch_context import ModelContext
from dist_train.determinism.dropout import convert_dropout
from dist_train.execution.flat_parameters import FlatParameters
from dist_train.models.financial_classifier import FinancialClassifier

SIZES = (2048, 16384, 65536)
TYPES = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
MULTIPLE_OF_16 = [["tt.divisibility", 16]]
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


class Kernel(NamedTuple):
    """A compiled kernel; shared memory and what is spilled of registers in bytes, registers of a thread."""

    name: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    spilled: int
    shared: int


class Compiler:
    """Takes the place of a kernel: compiles it for the arguments of a launch, and launches nothing."""

    def __init__(self, kernel: Any, found: list[Kernel]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
            signature: dict[str, str] = {}
            constants: dict[str, Any] = {}
            attributes: dict[tuple[int], Any] = {}
            given = dict(zip(self._kernel.arg_names, arguments, strict=False)) | named
            for place, parameter in enumerate(self._kernel.params):
                name, value = parameter.name, given[parameter.name]
                kind = None if parameter.is_constexpr else _kind(value)
                if kind is None:
                    constants[name], kind = value, "constexpr"
                elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                    attributes[(place,)] = MULTIPLE_OF_16
                signature[name] = kind
            made = triton.compile(
                ASTSource(self._kernel, signature, constants, attributes),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": num_warps, "num_stages": num_stages},
            )
            usage = _usage(made.asm["cubin"])
            self._found.append(Kernel(self._kernel.__name__, grid, num_warps, *usage, made.metadata.shared))

        return launch


def _kind(value: Any) -> str | None:
    """Triton's name of an argument's type; None: it is compiled in."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return None if value == 1 else "i32"
    return "fp32"


def _usage(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, to which registers are spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = USAGE.search(told.stdout)
    assert found is not None, told.stdout
    return int(found[1]), int(found[2])


def compiled(sizes: tuple[int, ...], hidden: int, classes: int) -> dict[int, list[Kernel]]:
    """The kernels of a step of so many rows, in the order of their launches."""
    kernels: dict[int, list[Kernel]] = {}
    current: list[Kernel] = []
    for module in (gpu_layers, gpu_sums):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.runtime.jit.JITFunction) and not name.startswith("_"):
                setattr(module, name, Compiler(kernel, current))
    model = convert_dropout(FinancialClassifier(50, hidden, classes), ModelContext())
    flat = FlatParameters(model.parameters())
    offsets: dict[torch.Tensor, int] = {parameter: flat.offset_of(parameter) for parameter in flat.parameters}
    layers: Any = model.get_submodule("layers")
    optimum = gpu_network.Optimum(
        flat.values, flat.zeros(2), torch.zeros(()), flat.size, 0.01, (0.9, 0.999), 1e-8, 1.0, offsets.get
    )  # fmt: skip
    for rows in sizes:
        current.clear()
        network = gpu_network.GpuNetwork(
            layers, optimum, gpu_network.Loss(None, 0.0), lambda one: one.unsqueeze(0), "tf32x3"
        )
        network.read_weights()
        buffers = network.buffers(gpu_network.slices_on(torch.device("cpu"), (rows,), 1), rows, rows)
        inbox = gpu_network.Inbox(1, rows, torch.device("cpu"))
        # As a table is: rows begin at multiples of 16 bytes.
        table = gpu_network.Rows(torch.zeros(rows, 52), torch.zeros(rows, dtype=torch.uint8), None)
        buffers.launch(table, inbox.index, inbox)
        kernels[rows] = list(current)
    return kernels


def table_of(kernels: dict[int, list[Kernel]]) -> str:
    """In Markdown."""
    lines = [
        "| rows | kernel | grid | warps | registers | spilled, bytes | shared memory, bytes |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for rows, found in kernels.items():
        lines += [
            f"| {rows:,} | `{one.name}` | {' x '.join(map(str, one.grid))} | {one.warps} | {one.registers} "
            f"| {one.spilled:,} | {one.shared:,} |"
            for one in found
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=SIZES)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--classes", type=int, default=3)
    chosen = parser.parse_args()
    print(table_of(compiled(tuple(chosen.rows), chosen.hidden, chosen.classes)))
