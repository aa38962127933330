"""The Triton kernels of banded softmax attention: its output and normalizer, and the gradients of q, and of k and v.

Token ``i`` of ``q`` [B, T, N, H] stands at index ``i + W`` of ``k`` and ``v`` [B, W+T, K, H] and meets the W indices
``i+1 … i+W`` of its own segment (0 is padding). All arrays are contiguous. The rows of a tile are (token, query head)
pairs, the ``GROUP`` query heads of one key/value head beside one another, so a key is loaded and turned once for all.

Queries and keys are held as two halves of a head, each in a power of two of columns of which ``H // 2`` are real: RoPE
turns the pairs ``(i, i + H/2)``, and a score is the sum of the halves' products. Angles come from tables
``cos``, ``sin`` [W+T, H/2] by index: turned queries and keys are rounded, and a gradient must meet the very ones that
the normalizer was summed of. Inside a kernel tokens and keys count from the tile's first.

fp32 operands are multiplied in full fp32. Scores are kept in base 2: ``SCALE = 1/√H`` and ``TO_BASE2 = log2(e)/√H``.
"""

import triton
import triton.language as tl

from pallas_kernels import numerics

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EMPTY = tl.constexpr(numerics.EMPTY)
ABSENT = tl.constexpr(numerics.ABSENT)


@triton.jit
def _turn(first, second, cos, sin, position, there, column, real, HALF: tl.constexpr):
    """Rotates the rows' pairs by their positions' angles, in fp32, and rounds once; ``position`` is [rows]."""
    at = position[:, None] * HALF + column[None, :]
    mask = there[:, None] & real[None, :]
    c, s = tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    # Sums of joined pairs are plain adds in a thread, but the compiler moves no layout across them: it would otherwise
    # turn the tile in the layout of the product that reads it, where every warp holds all of it and registers spill.
    turned_first = tl.sum(tl.join(a * c, -b * s), 2)
    turned_second = tl.sum(tl.join(b * c, a * s), 2)
    return turned_first.to(first.dtype), turned_second.to(first.dtype)


@triton.jit
def _turn_back(first, second, cos, sin, position, there, column, real, HALF: tl.constexpr):
    """The transpose of ``_turn``, for fp32 gradients."""
    at = position[:, None] * HALF + column[None, :]
    mask = there[:, None] & real[None, :]
    c, s = tl.load(cos + at, mask=mask, other=0.0), tl.load(sin + at, mask=mask, other=0.0)
    return first * c + second * s, second * c - first * s


@triton.jit
def _load_halves(x, row, there, column, real, HALF: tl.constexpr):
    """Both halves of the heads that begin at ``HALF * 2 * row``; 0 where masked."""
    at = row[:, None] * (2 * HALF) + column[None, :]
    mask = there[:, None] & real[None, :]
    return tl.load(x + at, mask=mask, other=0.0), tl.load(x + at + HALF, mask=mask, other=0.0)


@triton.jit
def _visible(q_index, k_index, q_segment, k_segment, WINDOW: tl.constexpr):
    """Whether the key at an index is in the window and segment of the query at an index; arguments broadcast."""
    band = (k_index <= q_index) & (k_index + WINDOW > q_index)
    return band & (q_segment == k_segment) & (q_segment != 0)


@triton.jit
def window_forward(
    q, k, v, q_segments, k_segments, sink, cos, sin, y, n,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
    TO_BASE2: tl.constexpr, ROPE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HALF_TILE: tl.constexpr, WIDTH_TILE: tl.constexpr,
):  # fmt: skip
    """``y`` and ``n`` of ``TOKENS`` tokens and the query heads of one key/value head; grid (tiles, K, B)."""
    GROUP: tl.constexpr = N // K
    WIDTH: tl.constexpr = 2 * HALF
    start, head, batch = tl.program_id(0) * TOKENS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_token, first_key = batch * T + start, batch * (WINDOW + T) + start
    q += first_token * N * WIDTH
    y += first_token * N * WIDTH
    n += first_token * N
    k += first_key * K * WIDTH
    v += first_key * K * WIDTH
    q_segments += first_token
    k_segments += first_key
    cos += start * HALF
    sin += start * HALF

    row = tl.arange(0, ROWS)
    token, q_head = row // GROUP, head * GROUP + row % GROUP
    inside = (token < TOKENS) & (start + token < T)
    column, wide = tl.arange(0, HALF_TILE), tl.arange(0, WIDTH_TILE)
    real, wide_real = column < HALF, wide < WIDTH
    q1, q2 = _load_halves(q, token * N + q_head, inside, column, real, HALF)
    if ROPE:
        q1, q2 = _turn(q1, q2, cos, sin, WINDOW + token, inside, column, real, HALF)
    q_segment = tl.load(q_segments + token, mask=inside, other=0)

    logit = tl.load(sink + q_head, mask=inside, other=EMPTY)
    sunk = logit > ABSENT
    top = tl.where(sunk, logit * LOG2E, EMPTY)
    total = tl.where(sunk, 1.0, 0.0)
    value = tl.zeros((ROWS, WIDTH_TILE), tl.float32)
    # Position 0 is too old for the first token already.
    for offset in range(1, WINDOW + TOKENS, KEYS):
        position = offset + tl.arange(0, KEYS)
        there = (position < WINDOW + TOKENS) & (start + position < WINDOW + T)
        k1, k2 = _load_halves(k, position * K + head, there, column, real, HALF)
        if ROPE:
            k1, k2 = _turn(k1, k2, cos, sin, position, there, column, real, HALF)
        k_segment = tl.load(k_segments + position, mask=there, other=0)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
        seen = _visible(token[:, None] + WINDOW, position[None, :], q_segment[:, None], k_segment[None, :], WINDOW)
        score = tl.where(seen, score * TO_BASE2, EMPTY)
        above = tl.maximum(top, tl.max(score, 1))
        # While a row has met nothing, its scores equal its maximum: masked again after the exponential.
        weight = tl.where(seen, tl.exp2(score - above[:, None]), 0.0)
        shrink = tl.exp2(top - above)
        top = above
        total = total * shrink + tl.sum(weight, 1)
        values = tl.load(
            v + (position[:, None] * K + head) * WIDTH + wide[None, :],
            mask=there[:, None] & wide_real[None, :],
            other=0.0,
        )
        value = tl.dot(weight.to(values.dtype), values, value * shrink[:, None], input_precision="ieee")

    visible = (q_segment != 0) & (total > 0.0)
    total = tl.where(visible, total, 1.0)
    value = tl.where(visible[:, None], value / total[:, None], 0.0)
    out = (token[:, None] * N + q_head[:, None]) * WIDTH + wide[None, :]
    tl.store(y + out, value.to(y.dtype.element_ty), mask=inside[:, None] & wide_real[None, :])
    tl.store(n + token * N + q_head, tl.where(visible, (top + tl.log2(total)) * LN2, EMPTY), mask=inside)


@triton.jit
def window_query_gradient(
    q, k, v, q_segments, k_segments, cos, sin, y, n, dy, dn, dq, dscore,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
    TO_BASE2: tl.constexpr, SCALE: tl.constexpr, ROPE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HALF_TILE: tl.constexpr, WIDTH_TILE: tl.constexpr,
):  # fmt: skip
    """``dq``, and ``dscore = dn - y·dy`` [B, T, N] fp32, what the row's scores gain beside ``dy·v``; grid as above."""
    GROUP: tl.constexpr = N // K
    WIDTH: tl.constexpr = 2 * HALF
    start, head, batch = tl.program_id(0) * TOKENS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_token, first_key = batch * T + start, batch * (WINDOW + T) + start
    q += first_token * N * WIDTH
    dq += first_token * N * WIDTH
    y += first_token * N * WIDTH
    dy += first_token * N * WIDTH
    n += first_token * N
    dn += first_token * N
    dscore += first_token * N
    k += first_key * K * WIDTH
    v += first_key * K * WIDTH
    q_segments += first_token
    k_segments += first_key
    cos += start * HALF
    sin += start * HALF

    row = tl.arange(0, ROWS)
    token, q_head = row // GROUP, head * GROUP + row % GROUP
    inside = (token < TOKENS) & (start + token < T)
    column, wide = tl.arange(0, HALF_TILE), tl.arange(0, WIDTH_TILE)
    real, wide_real = column < HALF, wide < WIDTH
    q1, q2 = _load_halves(q, token * N + q_head, inside, column, real, HALF)
    if ROPE:
        q1, q2 = _turn(q1, q2, cos, sin, WINDOW + token, inside, column, real, HALF)
    q_segment = tl.load(q_segments + token, mask=inside, other=0)

    at = (token[:, None] * N + q_head[:, None]) * WIDTH + wide[None, :]
    at_mask = inside[:, None] & wide_real[None, :]
    d_value = tl.load(dy + at, mask=at_mask, other=0.0)
    value = tl.load(y + at, mask=at_mask, other=0.0)
    gain = tl.load(dn + token * N + q_head, mask=inside, other=0.0)
    gain -= tl.sum(d_value.to(tl.float32) * value.to(tl.float32), 1)
    tl.store(dscore + token * N + q_head, gain, mask=inside)
    normalizer = tl.load(n + token * N + q_head, mask=inside, other=0.0) * LOG2E

    d1 = tl.zeros((ROWS, HALF_TILE), tl.float32)
    d2 = tl.zeros((ROWS, HALF_TILE), tl.float32)
    for offset in range(1, WINDOW + TOKENS, KEYS):
        position = offset + tl.arange(0, KEYS)
        there = (position < WINDOW + TOKENS) & (start + position < WINDOW + T)
        k1, k2 = _load_halves(k, position * K + head, there, column, real, HALF)
        if ROPE:
            k1, k2 = _turn(k1, k2, cos, sin, position, there, column, real, HALF)
        k_segment = tl.load(k_segments + position, mask=there, other=0)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee")
        seen = _visible(token[:, None] + WINDOW, position[None, :], q_segment[:, None], k_segment[None, :], WINDOW)
        share = tl.exp2(tl.where(seen, score * TO_BASE2 - normalizer[:, None], EMPTY))
        values = tl.load(
            v + (position[:, None] * K + head) * WIDTH + wide[None, :],
            mask=there[:, None] & wide_real[None, :],
            other=0.0,
        )
        d_share = tl.dot(d_value, tl.trans(values), input_precision="ieee")
        d_scores = (share * (d_share + gain[:, None])).to(k1.dtype)
        d1 = tl.dot(d_scores, k1, d1, input_precision="ieee")
        d2 = tl.dot(d_scores, k2, d2, input_precision="ieee")

    if ROPE:
        d1, d2 = _turn_back(d1, d2, cos, sin, WINDOW + token, inside, column, real, HALF)
    at = (token[:, None] * N + q_head[:, None]) * WIDTH + column[None, :]
    at_mask = inside[:, None] & real[None, :]
    tl.store(dq + at, (d1 * SCALE).to(dq.dtype.element_ty), mask=at_mask)
    tl.store(dq + at + HALF, (d2 * SCALE).to(dq.dtype.element_ty), mask=at_mask)


@triton.jit
def window_key_gradient(
    q, k, v, q_segments, k_segments, cos, sin, n, dy, dscore, dk, dv,
    T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, WINDOW: tl.constexpr,
    TO_BASE2: tl.constexpr, SCALE: tl.constexpr, ROPE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HALF_TILE: tl.constexpr, WIDTH_TILE: tl.constexpr,
):  # fmt: skip
    """``dk``, ``dv`` of ``KEYS`` keys, summed over the query heads that read them; grid (tiles of keys, K, B).

    Positions count from the tile's first key; the first token, W before it, stands there too.
    """
    GROUP: tl.constexpr = N // K
    WIDTH: tl.constexpr = 2 * HALF
    start, head, batch = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    first_token, first_key = batch * T + start - WINDOW, batch * (WINDOW + T) + start
    q += first_token * N * WIDTH
    dy += first_token * N * WIDTH
    n += first_token * N
    dscore += first_token * N
    k += first_key * K * WIDTH
    v += first_key * K * WIDTH
    dk += first_key * K * WIDTH
    dv += first_key * K * WIDTH
    q_segments += first_token
    k_segments += first_key
    cos += start * HALF
    sin += start * HALF

    key = tl.arange(0, KEYS)
    there = start + key < WINDOW + T
    column, wide = tl.arange(0, HALF_TILE), tl.arange(0, WIDTH_TILE)
    real, wide_real = column < HALF, wide < WIDTH
    k1, k2 = _load_halves(k, key * K + head, there, column, real, HALF)
    if ROPE:
        k1, k2 = _turn(k1, k2, cos, sin, key, there, column, real, HALF)
    k_segment = tl.load(k_segments + key, mask=there, other=0)
    at = (key[:, None] * K + head) * WIDTH + wide[None, :]
    values = tl.load(v + at, mask=there[:, None] & wide_real[None, :], other=0.0)

    d1 = tl.zeros((KEYS, HALF_TILE), tl.float32)
    d2 = tl.zeros((KEYS, HALF_TILE), tl.float32)
    d_values = tl.zeros((KEYS, WIDTH_TILE), tl.float32)
    row = tl.arange(0, ROWS)
    # The tile's last key is met W-1 indices later at most.
    # Of the tokens whose windows hold a key of the tile, those of the text.
    end = tl.minimum(WINDOW + KEYS - 1, WINDOW + T - start)
    for offset in range(tl.maximum(0, WINDOW - start), end, TOKENS):
        token, q_head = offset + row // GROUP, head * GROUP + row % GROUP
        inside = (row // GROUP < TOKENS) & (token < end)
        q1, q2 = _load_halves(q, token * N + q_head, inside, column, real, HALF)
        if ROPE:
            q1, q2 = _turn(q1, q2, cos, sin, token, inside, column, real, HALF)
        q_segment = tl.load(q_segments + token, mask=inside, other=0)
        normalizer = tl.load(n + token * N + q_head, mask=inside, other=0.0) * LOG2E
        gain = tl.load(dscore + token * N + q_head, mask=inside, other=0.0)
        d_value = tl.load(
            dy + (token[:, None] * N + q_head[:, None]) * WIDTH + wide[None, :],
            mask=inside[:, None] & wide_real[None, :], other=0.0,
        )  # fmt: skip
        score = tl.dot(k1, tl.trans(q1), input_precision="ieee")
        score = tl.dot(k2, tl.trans(q2), score, input_precision="ieee")
        seen = _visible(token[None, :], key[:, None], q_segment[None, :], k_segment[:, None], WINDOW)
        share = tl.exp2(tl.where(seen, score * TO_BASE2 - normalizer[None, :], EMPTY))
        d_values = tl.dot(share.to(d_value.dtype), d_value, d_values, input_precision="ieee")
        d_share = tl.dot(values, tl.trans(d_value), input_precision="ieee")
        d_scores = (share * (d_share + gain[None, :])).to(q1.dtype)
        d1 = tl.dot(d_scores, q1, d1, input_precision="ieee")
        d2 = tl.dot(d_scores, q2, d2, input_precision="ieee")

    tl.store(dv + at, d_values.to(dv.dtype.element_ty), mask=there[:, None] & wide_real[None, :])
    if ROPE:
        d1, d2 = _turn_back(d1, d2, cos, sin, key, there, column, real, HALF)
    at = (key[:, None] * K + head) * WIDTH + column[None, :]
    mask = there[:, None] & real[None, :]
    tl.store(dk + at, (d1 * SCALE).to(dk.dtype.element_ty), mask=mask)
    tl.store(dk + at + HALF, (d2 * SCALE).to(dk.dtype.element_ty), mask=mask)
