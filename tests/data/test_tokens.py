"""Tokens without padding, and the order that pads little."""

from __future__ import annotations

import pytest
import torch

from dist_train.data.order import SortedOrder
from dist_train.data.tokens import Padding, TokenRows, Tokens
from dist_train.determinism.batch_context import BatchContext, ModelContext
from dist_train.determinism.dropout import TokenDropout, convert_dropout

PADDING = Padding(pad_id=0, multiple=4, max_tokens=10)
TOKENS = Tokens(torch.tensor([5, 6, 7, 8, 9, 1, 2], dtype=torch.int32), torch.tensor([0, 2, 2, 7]))


def test_rows_are_padded_to_a_multiple_and_not_beyond_the_longest_that_can_be() -> None:
    rows = TokenRows(TOKENS, torch.tensor([0, 1, 0]), torch.arange(3), torch.device("cpu"), PADDING)
    ids, lengths = rows.slice(0, 3)
    assert ids.tolist() == [[5, 6, 0, 0, 0, 0, 0, 0], [0] * 8, [7, 8, 9, 1, 2, 0, 0, 0]]
    assert lengths.tolist() == [2, 0, 5]
    assert PADDING.width(torch.tensor([9])) == 10
    assert rows.padded_lengths.tolist() == [4, 4, 8]
    assert rows.slice(3, 3)[0].shape == (0, 4)
    chosen = TOKENS.select(torch.tensor([2, 0]))
    assert (chosen.ids.tolist(), chosen.ends.tolist()) == ([7, 8, 9, 1, 2, 5, 6], [0, 5, 7])


def test_packed_tokens_come_back_and_nothing_else_is_read() -> None:
    again = Tokens.unpack(TOKENS.pack())
    assert torch.equal(again.ids, TOKENS.ids)
    assert torch.equal(again.ends, TOKENS.ends)
    with pytest.raises((ValueError, OSError, KeyError)):
        Tokens.unpack(b"\x80\x04.")


@pytest.mark.parametrize("num_rows", [2, 16, 100, 129])
def test_the_sorted_order_has_every_row_once_and_is_a_function_of_the_epoch(num_rows: int) -> None:
    lengths = torch.randint(1, 60, (num_rows,), generator=torch.Generator().manual_seed(1))

    def order(epoch: int) -> torch.Tensor:
        return SortedOrder(lengths, 7, batch_rows=8, window_rows=32).rows(epoch, 0, num_rows)

    first = order(0)
    assert first.sort().values.tolist() == list(range(num_rows))
    assert torch.equal(first, order(0))
    assert num_rows < 16 or not torch.equal(first, order(1))


def test_rows_of_a_batch_are_of_similar_length() -> None:
    lengths = torch.randint(1, 60, (1024,), generator=torch.Generator().manual_seed(1))
    rows = SortedOrder(lengths, 7, batch_rows=16, window_rows=256).rows(0, 0, 1024)
    widths = lengths[rows].view(-1, 16).max(1).values
    assert widths.sum() * 16 < 1.15 * lengths.sum()
    assert widths.diff().sign().unique().numel() > 1  # and the batches do not come from short to long


def test_the_mask_of_a_token_does_not_depend_on_what_is_padded_behind_it() -> None:
    context = ModelContext(3)
    dropout = convert_dropout(TokenDropout(0.5, max_tokens=10), context)
    whole, place = torch.ones(4, 10, 6), BatchContext(epoch=1, first_row=20, slices=(4,))
    with context.bound(place):
        mask, short = dropout(whole), dropout(whole[:, :3])
    with context.bound(place.part(2, 2)):
        later = dropout(whole[2:])
    assert torch.equal(short, mask[:, :3])
    assert torch.equal(later, mask[2:])
    assert 0.3 < (mask == 0).double().mean() < 0.7
    assert len({tuple(row.flatten().tolist()) for row in mask}) == 4
