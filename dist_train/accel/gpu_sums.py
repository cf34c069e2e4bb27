"""Triton kernels that add up what the pieces of a step have left, in their order, and the update of the parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from dist_train.accel import gpu_parts

NOW_SIZE = 6
"""Numbers of the step at hand: see `gpu_layers`."""
RESULT_SIZE = 5


@triton.jit
def merge_statistics(
    stats, bias, mean_out, inverse_std_out, running_mean, running_var, num_batches, cursor, eps, momentum,
    NUM_PIECES: tl.constexpr, H: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation over all pieces, in their order; running statistics follow. Moves `cursor`."""
    part = tl.program_id(0)
    columns = part * BH + tl.arange(0, BH)
    inside = columns < H
    rows = tl.zeros([], tl.float64)
    mean = tl.zeros([BH], tl.float64)
    for start in range(0, NUM_PIECES, BP):
        pieces = start + tl.arange(0, BP)
        known = pieces < NUM_PIECES
        count = tl.load(stats + pieces * (2 * H + 1) + 2 * H, mask=known, other=0.0)
        own = tl.load(
            stats + pieces[:, None] * (2 * H + 1) + columns[None, :], mask=known[:, None] & inside[None, :], other=0.0
        )
        rows += tl.sum(count, 0)
        mean += tl.sum(own * count[:, None], 0)
    mean /= rows
    squares = tl.zeros([BH], tl.float64)
    for start in range(0, NUM_PIECES, BP):
        pieces = start + tl.arange(0, BP)
        both = (pieces < NUM_PIECES)[:, None] & inside[None, :]
        count = tl.load(stats + pieces * (2 * H + 1) + 2 * H, mask=pieces < NUM_PIECES, other=0.0)
        own = tl.load(stats + pieces[:, None] * (2 * H + 1) + columns[None, :], mask=both, other=0.0)
        spread = tl.load(stats + pieces[:, None] * (2 * H + 1) + H + columns[None, :], mask=both, other=0.0)
        away = own - mean[None, :]
        squares += tl.sum(spread + count[:, None] * away * away, 0)
    variance = squares / rows
    tl.store(mean_out + columns, mean.to(tl.float32), mask=inside)
    tl.store(inverse_std_out + columns, (1.0 / tl.sqrt(variance + eps)).to(tl.float32), mask=inside)
    shifted = mean + tl.load(bias + columns, mask=inside, other=0.0)
    former = tl.load(running_mean + columns, mask=inside, other=0.0)
    tl.store(running_mean + columns, (former + (shifted - former) * momentum).to(tl.float32), mask=inside)
    former = tl.load(running_var + columns, mask=inside, other=0.0)
    unbiased = squares / (rows - 1)
    tl.store(running_var + columns, (former + (unbiased - former) * momentum).to(tl.float32), mask=inside)
    if part == 0:
        tl.store(cursor, tl.load(cursor) + 1)
        tl.store(num_batches, tl.load(num_batches) + 1)


@triton.jit
def merge_sums(sums, stats, means, NUM_PIECES: tl.constexpr, H: tl.constexpr, BP: tl.constexpr, BH: tl.constexpr):
    """Means over all rows of dz and of dz times the normalised number, (2, H): pieces are added up in their order."""
    columns = tl.program_id(0) * BH + tl.arange(0, BH)
    inside = columns < H
    rows = tl.zeros([], tl.float64)
    plain, times = tl.zeros([BH], tl.float64), tl.zeros([BH], tl.float64)
    for start in range(0, NUM_PIECES, BP):
        pieces = start + tl.arange(0, BP)
        both = (pieces < NUM_PIECES)[:, None] & inside[None, :]
        rows += tl.sum(tl.load(stats + pieces * (2 * H + 1) + 2 * H, mask=pieces < NUM_PIECES, other=0.0), 0)
        place = sums + pieces[:, None] * 2 * H + columns[None, :]
        plain += tl.sum(tl.load(place, mask=both, other=0.0), 0)
        times += tl.sum(tl.load(place + H, mask=both, other=0.0), 0)
    tl.store(means + columns, (plain / rows).to(tl.float32), mask=inside)
    tl.store(means + H + columns, (times / rows).to(tl.float32), mask=inside)


@triton.jit
def sum_of_pieces(
    partials, losses, now, size, gradients, totals, PIECES: tl.constexpr, BP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of each slice, (slices, size), and its loss, weight and vote, (slices, 3) float64."""
    part, of_slice = tl.program_id(0), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    found = tl.zeros([BLOCK], tl.float32)
    begin = of_slice * PIECES
    for start in range(0, PIECES, BP):
        pieces = start + tl.arange(0, BP)
        both = (pieces < PIECES)[:, None] & inside[None, :]
        place = partials + (begin + pieces).to(tl.int64)[:, None] * size + columns[None, :]
        found += tl.sum(tl.load(place, mask=both, other=0.0), 0)
    tl.store(gradients + of_slice * size + columns, found, mask=inside)
    if part == 0:
        loss, weight = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        for start in range(0, PIECES, BP):
            pieces = start + tl.arange(0, BP)
            known = pieces < PIECES
            loss += tl.sum(tl.load(losses + (begin + pieces) * 2, mask=known, other=0.0), 0)
            weight += tl.sum(tl.load(losses + (begin + pieces) * 2 + 1, mask=known, other=0.0), 0)
        tl.store(totals + of_slice * 3, loss)
        tl.store(totals + of_slice * 3 + 1, weight)
        tl.store(totals + of_slice * 3 + 2, tl.load(now + 3).to(tl.float64, bitcast=True))


@triton.jit
def sum_of_slices(gradients, size, gradient, squares, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of the sum of losses, (size,): slices are added up in their order; the sum of squares of a block."""
    part = tl.program_id(0)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    found = tl.zeros([BLOCK], tl.float32)
    for of_slice in range(SLICES):
        found += tl.load(gradients + of_slice * size + columns, mask=inside, other=0.0)
    tl.store(gradient + columns, found, mask=inside)
    wide = found.to(tl.float64)
    tl.store(squares + part, tl.sum(wide * wide, 0))


@triton.jit
def _store_parts(parts, value, unit, column, size, U: tl.constexpr, H: tl.constexpr, inside, IN_PARTS: tl.constexpr):
    """Numbers of w2, (U, H), where the products read them: as they are and transposed, in two parts for TF32x3."""
    place, turned = unit * H + column, U * H + column * U + unit
    if IN_PARTS:
        high = gpu_parts.high_part(value)
        tl.store(parts + 2 * size + place, value - high, mask=inside)
        tl.store(parts + 2 * size + turned, value - high, mask=inside)
        value = high
    tl.store(parts + place, value, mask=inside)
    tl.store(parts + turned, value, mask=inside)


@triton.jit
def split_weights(w2, parts, U: tl.constexpr, H: tl.constexpr, IN_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """`parts`, (2 or 4, U H) float32, from the weights of the second layer; `clip_and_update` keeps it up to date."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < U * H
    value = tl.load(w2 + place, mask=inside, other=0.0)
    _store_parts(parts, value, place // H, place % H, U * H, U, H, inside, IN_PARTS)


@triton.jit
def clip_and_update(
    gradient, squares, totals, now, values, moments, steps, results, verdict, parts, at_w2, size, decayed, settings,
    SLICES: tl.constexpr, NOW: tl.constexpr, RESULT: tl.constexpr, NUM_PARTS: tl.constexpr, BPARTS: tl.constexpr,
    BLOCK: tl.constexpr, OF_ROWS: tl.constexpr, U: tl.constexpr, H: tl.constexpr, IN_PARTS: tl.constexpr,
):  # fmt: skip
    """Norm, verdict, clipping and AdamW on BLOCK parameters; the first `decayed` ones have weight decay.

    `settings`, float64: the largest norm, both betas, 1 minus each, the logarithm of each, eps, weight decay. Not
    arguments, which would be rounded to float32. `moments` is (2, size). A loss or norm that is not finite leaves
    everything as it is. `results` is (places, RESULT) float64: loss, weight, votes, norm before clipping, whether both
    were finite; `verdict` is the last of them as a bool. `at_w2`: where w2 begins in `values`; -1: it is not there.
    """
    part = tl.program_id(0)
    loss, weight = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    votes = tl.full([], 0.0, tl.float64)
    for of_slice in range(SLICES):
        loss += tl.load(totals + of_slice * 3)
        weight += tl.load(totals + of_slice * 3 + 1)
        votes += tl.load(totals + of_slice * 3 + 2)
    max_norm = tl.load(settings)
    beta2 = tl.load(settings + 2).to(tl.float32)
    rest1, rest2 = tl.load(settings + 3).to(tl.float32), tl.load(settings + 4).to(tl.float32)
    eps = tl.load(settings + 7).to(tl.float32)
    divisor = weight
    if OF_ROWS:
        divisor = tl.where(weight == 0.0, 1.0, weight)
    blocks = tl.arange(0, BPARTS)
    norm = tl.sqrt(tl.sum(tl.load(squares + blocks, mask=blocks < NUM_PARTS, other=0.0), 0)) / divisor
    factor = 1.0 / divisor * tl.minimum(max_norm / (norm + 1e-6), 1.0)
    both = loss + norm
    finite = tl.where(both - both == 0.0, 1, 0)
    step = tl.load(now + NOW - 1).to(tl.float64) + 1.0
    rate = tl.load(now + 2).to(tl.float64, bitcast=True)
    if part == 0:
        place = results + tl.load(now + NOW - 2) * RESULT
        tl.store(place, loss)
        tl.store(place + 1, weight)
        tl.store(place + 2, votes)
        tl.store(place + 3, norm)
        tl.store(place + 4, finite.to(tl.float64))
        tl.store(verdict, finite == 1)
        tl.store(steps, tl.where(finite == 1, step, step - 1.0).to(tl.float32))
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = (columns < size) & (finite == 1)
    slope = tl.load(gradient + columns, mask=inside, other=0.0) * factor.to(tl.float32)
    value = tl.load(values + columns, mask=inside, other=0.0)
    decay = tl.where(columns < decayed, (rate * tl.load(settings + 8)).to(tl.float32), 0.0)
    value -= decay * value
    mean = tl.load(moments + columns, mask=inside, other=0.0)
    mean += (slope - mean) * rest1
    square = tl.load(moments + size + columns, mask=inside, other=0.0)
    square = square * beta2 + rest2 * slope * slope
    rate1 = (rate / (1.0 - tl.exp(step * tl.load(settings + 5)))).to(tl.float32)
    root2 = tl.sqrt(1.0 - tl.exp(step * tl.load(settings + 6))).to(tl.float32)
    value -= rate1 * mean / (tl.sqrt(square) / root2 + eps)
    tl.store(values + columns, value, mask=inside)
    tl.store(moments + columns, mean, mask=inside)
    tl.store(moments + size + columns, square, mask=inside)
    if at_w2 >= 0:
        place = columns - at_w2
        of_w2 = inside & (place >= 0) & (place < U * H)
        _store_parts(parts, value, place // H, place % H, U * H, U, H, of_w2, IN_PARTS)
