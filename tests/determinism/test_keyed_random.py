"""Random numbers as a function of their key."""

from __future__ import annotations

import pytest
import torch

from dist_train.determinism.keyed_random import RowRandom, derive, mix, permutation, seeded, uniform_keys

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def test_golden_values() -> None:
    """A change here changes the split, the order, the masks and the weights of every run there is."""
    assert derive("a", 0) == 7287187068323254222
    assert derive("order", 7, 3) == -4505747393058161647
    assert permutation(10, "order", 0, 0).tolist() == [2, 6, 3, 4, 9, 1, 7, 5, 8, 0]
    assert uniform_keys(3, "split", 0).tolist() == [-8712424310419649736, 3899941845868325389, 7632312942453977635]
    random = RowRandom(5)
    expected = [[-10557, -23780, 28027], [-32122, -12150, 16873]]
    assert random.bits16(random.counter("dropout layers.3", 3, 2, 100), 2, 3, CPU).tolist() == expected


def splitmix64(state: int) -> int:
    """The finaliser as in the paper, on Python's integers."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_mix_is_splitmix64() -> None:
    numbers = [0, 1, 2, MASK, 1 << 63, (1 << 63) - 1, 0x9E3779B97F4A7C15, 1234567890123456789]
    signed = torch.tensor([n - (1 << 64) if n >= 1 << 63 else n for n in numbers])
    assert [n & MASK for n in mix(signed).tolist()] == [splitmix64(n) for n in numbers]
    # The published first output of the generator seeded with 0 and with 1234567.
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567 + 0x9E3779B97F4A7C15) == 6457827717110365317


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation(count: int) -> None:
    order = permutation(count, "order", 1, 2)
    assert order.sort().values.tolist() == list(range(count))
    assert torch.equal(order, permutation(count, "order", 1, 2))
    if count == 1000:
        for other in (permutation(count, "order", 1, 3), permutation(count, "order", 2, 2), permutation(count, "x")):
            assert (order == other).sum() < 10


def test_keys_do_not_run_into_each_other() -> None:
    keys = [("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), (1, "a"), ("a", 11), ("a", 1, 1), ()]
    assert len({derive(*key) for key in keys}) == len(keys)


def test_row_keys_do_not_depend_on_the_number_of_rows() -> None:
    assert torch.equal(uniform_keys(1000, "split", 3)[:17], uniform_keys(17, "split", 3))
    assert len(uniform_keys(100_000, "split", 3).unique()) == 100_000
    assert not torch.equal(uniform_keys(17, "split", 4), uniform_keys(17, "split", 3))


def test_nothing_touches_the_global_generator() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    permutation(10, "order")
    uniform_keys(10, "split")
    RowRandom(0).bits16(RowRandom(0).counter("a", 5, 0, 0), 3, 5, CPU)
    with seeded("weights", 1):
        first = torch.randn(3)
    with pytest.raises(ZeroDivisionError), seeded("weights", 1):
        torch.randn(3 // 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(5)
    with seeded("weights", 1):
        assert torch.equal(torch.randn(3), first)


def test_many_shapes_do_not_fill_the_memory() -> None:
    random = RowRandom(0)
    for rows in range(100):
        random.bits16(0, rows, 4, CPU)
    assert len(random.sequences) == 1
