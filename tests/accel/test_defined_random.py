"""Initial weights with defined bits: torch's to rounding, whatever was drawn before them."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

from dist_train.accel.defined_random import InitialValues

SIZES = [0, 1, 7, 15, 16, 17, 31, 32, 1000]


def drawn(sizes: list[int], how: str, *limits: float) -> list[Tensor]:
    torch.manual_seed(5)
    return [getattr(torch.empty(size), how)(*limits) for size in sizes]


@pytest.mark.parametrize(("how", "limits"), [("uniform_", (-0.3, 0.7)), ("normal_", (0.5, 2.0)), ("normal_", ())])
def test_they_are_torchs_to_rounding(how: str, limits: tuple[float, ...]) -> None:
    expected = drawn(SIZES, how, *limits)
    with InitialValues():
        found = drawn(SIZES, how, *limits)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=2e-6, atol=2e-6)


def test_a_generator_of_the_callers_and_modules_of_torch() -> None:
    with InitialValues():
        own = torch.empty(40).normal_(generator=torch.Generator().manual_seed(9))
        torch.manual_seed(1)
        table = nn.Embedding(30, 4)
        layer = nn.Linear(4, 3)
    torch.testing.assert_close(own, torch.empty(40).normal_(generator=torch.Generator().manual_seed(9)))
    torch.manual_seed(1)
    torch.testing.assert_close(table.weight, nn.Embedding(30, 4).weight)
    torch.testing.assert_close(layer.weight, nn.Linear(4, 3).weight)


# Whole bits: what every processor has.
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("uniform_", "433f2ec1aa5e521df17d11fb400e08c4b0cc0b317ffbf00465f091234a1390be"),
        ("normal_", "fc0ac383f5305289355324439f39df669853a6a8136de0b411391a6209966565"),
    ],
)
def test_bits_that_every_processor_has(how: str, expected: str) -> None:
    with InitialValues():
        found = drawn([7, 100, 33], how, -0.3, 0.7)
    assert hashlib.sha256(torch.cat(found).numpy().tobytes()).hexdigest() == expected


def test_other_types_and_what_a_block_has_ended_are_torchs() -> None:
    torch.manual_seed(2)
    with InitialValues():
        wide = torch.empty(20, dtype=torch.float64).normal_()
    after = torch.empty(20).normal_()
    torch.manual_seed(2)
    assert torch.equal(wide, torch.empty(20, dtype=torch.float64).normal_())
    assert torch.equal(after, torch.empty(20).normal_())
