"""Triton kernels of a training step of a two-layer network with BatchNorm, worked through in tiles of rows.

A program computes a piece: up to PIECE_ROWS rows of one slice, a tile of BM rows at a time. What pieces contribute to a
sum is stored, one by one; `gpu_sums` adds it up in the order of the pieces. So the numbers of a slice depend on its
rows alone: not on which rank holds it, how many slices that rank holds, or how many processors the GPU has.

Names: x are features, y1 and y2 what the first and the second Linear give, h1 and h2 what ReLU and dropout make of
them; d... the gradient of the loss. `now` are the numbers of the step at hand, NOW int64: the first counters of the
two dropouts' random bits, learning rate and vote to stop as float64's bits, place of the result, updates so far.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dist_train.accel import gpu_parts
from dist_train.determinism.keyed_random import LAST_SHIFT, ROUNDS

# Triton reads a global only where it is one of these.
_SHIFT1, _FACTOR1, _SHIFT2, _FACTOR2 = (tl.constexpr(number) for one in ROUNDS for number in one)
_LAST_SHIFT = tl.constexpr(LAST_SHIFT)


@triton.jit
def _piece(starts, piece, PIECE_ROWS: tl.constexpr, PIECES: tl.constexpr):
    """First row of a piece, and the row after its last."""
    of_slice = piece // PIECES
    first = tl.load(starts + of_slice) + (piece % PIECES) * PIECE_ROWS
    return first, tl.minimum(tl.load(starts + of_slice + 1), first + PIECE_ROWS)


@triton.jit
def _kept(counter, rows, first_column, width, threshold, INCREMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Which numbers of a tile dropout keeps, (BM, BN), as KeyedDropout: a SplitMix64 number for four columns."""
    words = (width + 3) // 4
    word = first_column // 4 + tl.arange(0, BN // 4)
    z = counter + (rows.to(tl.int64)[:, None] * words + word[None, :]) * INCREMENT
    z = z.to(tl.uint64, bitcast=True)
    z ^= z >> _SHIFT1
    z *= _FACTOR1
    z ^= z >> _SHIFT2
    z *= _FACTOR2
    z ^= z >> _LAST_SHIFT
    even = tl.join((z & 0xFFFF).to(tl.int32), ((z >> 32) & 0xFFFF).to(tl.int32))
    odd = tl.join(((z >> 16) & 0xFFFF).to(tl.int32), (z >> 48).to(tl.int32))
    bits = tl.reshape(tl.join(even, odd), [BM, BN])
    return bits.to(tl.int16).to(tl.int32) >= threshold


@triton.jit
def _hidden(
    y1, mean, inverse_std, gamma, beta, counter, rows, live, first_column, width, threshold, scale,
    DROPS: tl.constexpr, INCREMENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Normalised numbers and activations of a tile, (BM, BN) each; zeros beyond the last row and column."""
    columns = first_column + tl.arange(0, BN)
    inside = columns < width
    both = live[:, None] & inside[None, :]
    y = tl.load(y1 + rows[:, None] * width + columns[None, :], mask=both, other=0.0)
    shift = tl.load(mean + columns, mask=inside, other=0.0)
    factor = tl.load(inverse_std + columns, mask=inside, other=0.0)
    normal = (y - shift[None, :]) * factor[None, :]
    weight = tl.load(gamma + columns, mask=inside, other=0.0)
    bias = tl.load(beta + columns, mask=inside, other=0.0)
    z = normal * weight[None, :] + bias[None, :]
    # Not `maximum`, which would turn NaN into 0.
    positive = tl.where(z <= 0, 0.0, z)
    if DROPS:
        kept = _kept(counter, rows, first_column, width, threshold, INCREMENT, BM, BN)
        positive = tl.where(kept, positive * scale, 0.0)
    return tl.where(both, normal, 0.0), tl.where(both, positive, 0.0)


@triton.jit
def _part_of(matrix, rows, columns, num_rows, num_columns):
    """Some rows and columns of a matrix; zeros beyond its last ones."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(matrix + rows[:, None] * num_columns + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b, of float32 numbers; `bf16` rounds them before."""
    if PRECISION == "bf16":
        sums = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _dot_parts(a, parts, place, inside, size, sums, PRECISION: tl.constexpr):
    """sums + a @ b, of which `parts` holds the numbers and, for "tf32x3", `size` further on what is left of them.

    The three products of TF32x3 as `tl.dot` has it, but the parts of b are there and need not pass the registers.
    """
    b = tl.load(parts + place, mask=inside, other=0.0)
    if PRECISION == "tf32x3":
        rest = tl.load(parts + size + place, mask=inside, other=0.0)
        high = gpu_parts.high_part(a)
        sums = tl.dot(a - high, b, sums, input_precision="tf32")
        sums = tl.dot(high, rest, sums, input_precision="tf32")
        sums = tl.dot(high, b, sums, input_precision="tf32")
    else:
        sums = _dot(a, b, sums, PRECISION)
    return sums


@triton.jit
def first_linear(
    x, index, index_stride, inbox, inbox_stride, cursor, steps, now, w1, y1, stats, starts, PIECE_ROWS: tl.constexpr,
    PIECES: tl.constexpr, NOW: tl.constexpr, F: tl.constexpr, X_STRIDE: tl.constexpr, H: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y1 = x @ w1.T of a piece's rows and BH columns, and their count, mean and sum of squared deviations.

    The bias is left out: BatchNorm subtracts it. `stats` is (pieces, 2 H + 1) float64. Program 0 makes `now`.
    """
    piece, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(cursor)
    if (piece == 0) & (part == 0):
        for i in tl.static_range(NOW - 2):
            tl.store(now + i, tl.load(inbox + slot * inbox_stride + i))
        tl.store(now + NOW - 2, slot)
        tl.store(now + NOW - 1, tl.load(steps).to(tl.int64))
    first, end = _piece(starts, piece, PIECE_ROWS, PIECES)
    columns = part * BH + tl.arange(0, BH)
    inside = columns < H
    count = tl.full([], 0.0, tl.float64)
    mean = tl.zeros([BH], tl.float64)
    squares = tl.zeros([BH], tl.float64)
    b = _part_of(w1, columns, tl.arange(0, BF), H, F)
    for tile in range(0, PIECE_ROWS, BM):
        rows = first + tile + tl.arange(0, BM)
        live = rows < end
        picked = tl.load(index + slot * index_stride + rows, mask=live, other=0)
        sums = tl.zeros([BM, BH], tl.float32)
        for start in tl.static_range(0, F, BF):
            features = start + tl.arange(0, BF)
            both = live[:, None] & (features < X_STRIDE)[None, :]
            a = tl.load(x + picked[:, None] * X_STRIDE + features[None, :], mask=both, other=0.0)
            if F > BF:
                b = _part_of(w1, columns, features, H, F)
            sums = _dot(a, tl.trans(b), sums, PRECISION)
        tl.store(y1 + rows[:, None] * H + columns[None, :], sums, mask=live[:, None] & inside[None, :])
        # Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
        found = tl.sum(live.to(tl.float64), 0)
        own = tl.sum(tl.where(live[:, None], sums, 0.0), 0) / tl.maximum(found, 1.0).to(tl.float32)
        away = tl.where(live[:, None], sums - own[None, :], 0.0)
        total = tl.maximum(count + found, 1.0)
        step = own.to(tl.float64) - mean
        mean += step * (found / total)
        squares += tl.sum(away * away, 0).to(tl.float64) + step * step * (count * found / total)
        count += found
    place = stats + piece * (2 * H + 1)
    tl.store(place + columns, mean, mask=inside)
    tl.store(place + H + columns, squares, mask=inside)
    if part == 0:
        tl.store(place + 2 * H, count)


@triton.jit
def second_linear_and_loss(
    y1, mean, inverse_std, gamma, beta, w2, b2, w3, b3, index, index_stride, targets, class_weights, row_weights, now,
    dy2, partials, losses, size, at_b2, at_w3, at_b3, starts, threshold1, scale1, threshold2, scale2, smoothing,
    PIECE_ROWS: tl.constexpr, PIECES: tl.constexpr, DROPS1: tl.constexpr, DROPS2: tl.constexpr,
    OF_CLASSES: tl.constexpr, OF_ROWS: tl.constexpr, FEW_CLASSES: tl.constexpr, TRAINS_B2: tl.constexpr,
    TRAINS_W3: tl.constexpr, TRAINS_B3: tl.constexpr, NOW: tl.constexpr, INCREMENT: tl.constexpr, H: tl.constexpr,
    U: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From y1 of a piece to its loss, and back to dy2; the gradients of the last layer and of the second bias.

    `losses` is (pieces, 2) float64: the sum over rows, and the sum of weights. `at_...`: where a parameter's gradient
    begins in a piece's part of `partials`, (pieces, size).
    """
    piece = tl.program_id(0)
    first, end = _piece(starts, piece, PIECE_ROWS, PIECES)
    counter1, counter2 = tl.load(now), tl.load(now + 1)
    index += tl.load(now + NOW - 2) * index_stride
    outs, classes = tl.arange(0, BO), tl.arange(0, BC)
    is_out, is_class = outs < U, classes < C
    inside3 = is_class[:, None] & is_out[None, :]
    bias2 = tl.load(b2 + outs, mask=is_out, other=0.0)
    bias3 = tl.load(b3 + classes, mask=is_class, other=0.0)
    if OF_CLASSES:
        of_class = tl.load(class_weights + classes, mask=is_class, other=0.0)
    else:
        of_class = tl.where(is_class, 1.0, 0.0)
    all_classes = tl.sum(of_class, 0)
    loss_sum, weight_sum = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    dw3, db3, db2 = tl.zeros([BC, BO], tl.float32), tl.zeros([BC], tl.float32), tl.zeros([BO], tl.float32)
    for tile in range(0, PIECE_ROWS, BM):
        rows = first + tile + tl.arange(0, BM)
        live = rows < end
        y2 = tl.zeros([BM, BO], tl.float32)
        for start in range(0, H, BK):
            _, h1 = _hidden(
                y1, mean, inverse_std, gamma, beta, counter1, rows, live, start, H, threshold1, scale1,
                DROPS1, INCREMENT, BM, BK,
            )  # fmt: skip
            columns = start + tl.arange(0, BK)
            both = (columns < H)[:, None] & is_out[None, :]
            y2 = _dot_parts(h1, w2, outs[None, :] * H + columns[:, None], both, 2 * U * H, y2, PRECISION)
        y2 += bias2[None, :]
        h2 = tl.where(y2 <= 0, 0.0, y2)
        if DROPS2:
            h2 = tl.where(_kept(counter2, rows, 0, U, threshold2, INCREMENT, BM, BO), h2 * scale2, 0.0)
        h2 = tl.where(live[:, None] & is_out[None, :], h2, 0.0)
        if FEW_CLASSES:
            logits = tl.zeros([BM, BC], tl.float32)
            for one in tl.static_range(C):
                row = tl.load(w3 + one * U + outs, mask=is_out, other=0.0)
                logits = tl.where(classes[None, :] == one, tl.sum(h2 * row[None, :], 1)[:, None], logits)
        else:
            last = tl.load(w3 + classes[:, None] * U + outs[None, :], mask=inside3, other=0.0)
            logits = _dot(h2, tl.trans(last), tl.zeros([BM, BC], tl.float32), PRECISION)
        logits += bias3[None, :]
        logits = tl.where(is_class[None, :], logits, float("-inf"))
        away = logits - tl.max(logits, 1)[:, None]
        powers = tl.exp(away)
        total = tl.sum(powers, 1)
        shares = powers / total[:, None]
        logs = tl.where(is_class[None, :], away - tl.log(total)[:, None], 0.0)
        picked = tl.load(index + rows, mask=live, other=0)
        hot = tl.load(targets + picked, mask=live, other=0).to(tl.int32)[:, None] == classes[None, :]
        weight = tl.sum(tl.where(hot, of_class[None, :], 0.0), 1)
        loss = -(1.0 - smoothing) * weight * tl.sum(tl.where(hot, logs, 0.0), 1)
        loss -= smoothing / C * tl.sum(logs * of_class[None, :], 1)
        slope = (1.0 - smoothing) * weight[:, None] * (shares - tl.where(hot, 1.0, 0.0))
        slope += smoothing / C * (all_classes * shares - of_class[None, :])
        slope = tl.where(live[:, None] & is_class[None, :], slope, 0.0)
        if OF_ROWS:
            of_row = tl.load(row_weights + picked, mask=live, other=0.0).to(tl.float32)
            loss, weight, slope = loss * of_row, weight * of_row, slope * of_row[:, None]
        loss_sum += tl.sum(tl.where(live, loss, 0.0), 0).to(tl.float64)
        weight_sum += tl.sum(tl.where(live, weight, 0.0), 0).to(tl.float64)
        db3 += tl.sum(slope, 0)
        if FEW_CLASSES:
            back = tl.zeros([BM, BO], tl.float32)
            for one in tl.static_range(C):
                row = tl.load(w3 + one * U + outs, mask=is_out, other=0.0)
                of_one = tl.sum(tl.where(classes[None, :] == one, slope, 0.0), 1)[:, None]
                back += of_one * row[None, :]
                dw3 += tl.where(classes[:, None] == one, tl.sum(of_one * h2, 0)[None, :], 0.0)
        else:
            dw3 = _dot(tl.trans(slope), h2, dw3, PRECISION)
            back = _dot(slope, last, tl.zeros([BM, BO], tl.float32), PRECISION)
        back = tl.where(h2 > 0, back * scale2, 0.0)
        db2 += tl.sum(back, 0)
        tl.store(dy2 + rows[:, None] * U + outs[None, :], back, mask=live[:, None] & is_out[None, :])
    place = partials + piece.to(tl.int64) * size
    if TRAINS_W3:
        tl.store(place + at_w3 + classes[:, None] * U + outs[None, :], dw3, mask=inside3)
    if TRAINS_B3:
        tl.store(place + at_b3 + classes, db3, mask=is_class)
    if TRAINS_B2:
        tl.store(place + at_b2 + outs, db2, mask=is_out)
    tl.store(losses + piece * 2, loss_sum)
    tl.store(losses + piece * 2 + 1, weight_sum)


@triton.jit
def second_linear_backward(
    y1, mean, inverse_std, gamma, beta, w2, dy2, now, dz, sums, partials, size, at_w2, at_gamma, at_beta, starts,
    threshold1, scale1, PIECE_ROWS: tl.constexpr, PIECES: tl.constexpr, OF_INPUTS: tl.constexpr, DROPS1: tl.constexpr,
    TRAINS_W2: tl.constexpr, TRAINS_GAMMA: tl.constexpr, TRAINS_BETA: tl.constexpr, INCREMENT: tl.constexpr,
    H: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From dy2 of a piece to dz, the gradient of what BatchNorm gives, for BH columns; dw2, dgamma, dbeta.

    `sums` is (pieces, 2, H) float64: over the rows, of dz, and of dz times the normalised number.
    """
    piece, part = tl.program_id(0), tl.program_id(1)
    first, end = _piece(starts, piece, PIECE_ROWS, PIECES)
    counter = tl.load(now)
    columns, outs = part * BH + tl.arange(0, BH), tl.arange(0, BO)
    inside, is_out = columns < H, outs < U
    of_w2 = is_out[:, None] & inside[None, :]
    dw2 = tl.zeros([BO, BH], tl.float32)
    plain, times = tl.zeros([BH], tl.float64), tl.zeros([BH], tl.float64)
    for tile in range(0, PIECE_ROWS, BM):
        rows = first + tile + tl.arange(0, BM)
        live = rows < end
        normal, h1 = _hidden(
            y1, mean, inverse_std, gamma, beta, counter, rows, live, part * BH, H, threshold1, scale1,
            DROPS1, INCREMENT, BM, BH,
        )  # fmt: skip
        if TRAINS_W2:
            back = tl.load(dy2 + rows[:, None] * U + outs[None, :], mask=live[:, None] & is_out[None, :], other=0.0)
            dw2 = _dot(tl.trans(back), h1, dw2, PRECISION)
        if OF_INPUTS:
            slope = tl.zeros([BM, BH], tl.float32)
            for start in range(0, BO, BK):
                few = start + tl.arange(0, BK)
                a = tl.load(dy2 + rows[:, None] * U + few[None, :], mask=live[:, None] & (few < U)[None, :], other=0.0)
                both = (few < U)[:, None] & inside[None, :]
                place = U * H + columns[None, :] * U + few[:, None]
                slope = _dot_parts(a, w2, place, both, 2 * U * H, slope, PRECISION)
            slope *= scale1
            slope = tl.where(h1 > 0, slope, 0.0)
            tl.store(dz + rows[:, None] * H + columns[None, :], slope, mask=live[:, None] & inside[None, :])
            plain += tl.sum(slope, 0).to(tl.float64)
            times += tl.sum(slope * normal, 0).to(tl.float64)
    place = partials + piece.to(tl.int64) * size
    if TRAINS_W2:
        tl.store(place + at_w2 + outs[:, None] * H + columns[None, :], dw2, mask=of_w2)
    if OF_INPUTS:
        tl.store(sums + piece * 2 * H + columns, plain, mask=inside)
        tl.store(sums + piece * 2 * H + H + columns, times, mask=inside)
        if TRAINS_GAMMA:
            tl.store(place + at_gamma + columns, times.to(tl.float32), mask=inside)
        if TRAINS_BETA:
            tl.store(place + at_beta + columns, plain.to(tl.float32), mask=inside)


@triton.jit
def first_linear_backward(
    x, index, index_stride, now, y1, mean, inverse_std, gamma, dz, means, partials, size, at_w1, starts,
    PIECE_ROWS: tl.constexpr, PIECES: tl.constexpr, NOW: tl.constexpr, F: tl.constexpr, X_STRIDE: tl.constexpr,
    H: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw1 of a piece, for BH units and BF features: through BatchNorm, whose batch is all rows."""
    piece, part = tl.program_id(0), tl.program_id(1)
    first, end = _piece(starts, piece, PIECE_ROWS, PIECES)
    index += tl.load(now + NOW - 2) * index_stride
    columns, features = part * BH + tl.arange(0, BH), tl.program_id(2) * BF + tl.arange(0, BF)
    inside, known = columns < H, features < F
    shift = tl.load(mean + columns, mask=inside, other=0.0)
    factor = tl.load(inverse_std + columns, mask=inside, other=0.0)
    weight = tl.load(gamma + columns, mask=inside, other=0.0) * factor
    plain = tl.load(means + columns, mask=inside, other=0.0)
    times = tl.load(means + H + columns, mask=inside, other=0.0)
    dw1 = tl.zeros([BH, BF], tl.float32)
    for tile in range(0, PIECE_ROWS, BM):
        rows = first + tile + tl.arange(0, BM)
        live = rows < end
        both = live[:, None] & inside[None, :]
        place = rows[:, None] * H + columns[None, :]
        normal = (tl.load(y1 + place, mask=both, other=0.0) - shift[None, :]) * factor[None, :]
        slope = tl.load(dz + place, mask=both, other=0.0) - plain[None, :] - normal * times[None, :]
        slope = tl.where(both, slope * weight[None, :], 0.0)
        picked = tl.load(index + rows, mask=live, other=0)
        both = live[:, None] & (features < X_STRIDE)[None, :]
        a = tl.load(x + picked[:, None] * X_STRIDE + features[None, :], mask=both, other=0.0)
        dw1 = _dot(tl.trans(slope), a, dw1, PRECISION)
    place = partials + piece.to(tl.int64) * size + at_w1
    tl.store(place + columns[:, None] * F + features[None, :], dw1, mask=inside[:, None] & known[None, :])
