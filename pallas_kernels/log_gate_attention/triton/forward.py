"""Triton: outputs, log normalizers and states.

Programs that read queries take rows of several query heads at once: row ``x`` of a tile is place ``x % C`` of the chunk
in query head ``x // C`` of the block. All of them share the keys, values and state that the tile meets.
"""

import triton
import triton.language as tl

from pallas_kernels.log_gate_attention.triton.decay import (
    EMPTY,
    SMALLEST,
    carried,
    into_state,
    pair,
    row_scale,
    unscale,
)


@triton.jit
def load_tile(ptr, row, column, rows_in, WIDTH: tl.constexpr):
    """``[rows, columns]`` of a row-major array of ``WIDTH`` columns, 0 outside."""
    at = row[:, None] * WIDTH + column[None, :]
    return tl.load(ptr + at, mask=rows_in[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def load_tile_t(ptr, row, column, rows_in, WIDTH: tl.constexpr):
    """The same, transposed: ``[columns, rows]``."""
    at = row[None, :] * WIDTH + column[:, None]
    return tl.load(ptr + at, mask=(column < WIDTH)[:, None] & rows_in[None, :], other=0.0)


@triton.jit
def store_tile(ptr, row, column, rows_in, x, WIDTH: tl.constexpr):
    at = row[:, None] * WIDTH + column[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=rows_in[:, None] & (column < WIDTH)[None, :])


@triton.jit
def states_kernel(
    k_ptr, v_ptr, kv_ptr, z_ptr,
    past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr,
    kvs_ptr, zs_ptr, kv_out_ptr, z_out_ptr, T, chunks,
    S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk and after the last: a program per head and ``[BF, BH]`` block, from chunk to chunk.

    ``kvs[B, S, chunks, F, H]`` is rounded to what matmuls read; ``zs[B, S, chunks, F]`` is fp32.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    h = tl.program_id(2) * BH + tl.arange(0, BH)
    place = tl.arange(0, C)
    first = tl.program_id(2) == 0
    kv = load_tile(kv_ptr, head * F + f, h, f < F, H)
    z = tl.load(z_ptr + head * F + f, mask=f < F, other=0.0)
    for n in range(chunks):
        at = head * chunks + n
        store_tile(kvs_ptr, at * F + f, h, f < F, kv, H)
        if first:
            tl.store(zs_ptr + at * F + f, z, mask=f < F)
        take, keep = into_state(
            past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr + head * (chunks + 1) + n, at * C, C
        )
        t = n * C + place
        key = load_tile_t(k_ptr, (batch * T + t) * S + s, f, t < T, F)
        v = load_tile(v_ptr, (batch * T + t) * K + s // (S // K), h, t < T, H)
        taken = key.to(tl.float32) * take[None, :]
        kv = tl.dot(taken.to(v.dtype), v, keep * kv, input_precision=PRECISION)
        z = keep * z + tl.sum(taken, 1)
    store_tile(kv_out_ptr, head * F + f, h, f < F, kv, H)
    if first:
        tl.store(z_out_ptr + head * F + f, z, mask=f < F)


@triton.jit
def _write(
    y_ptr, n_ptr, den_ptr, row, kept, h, num, den, M, past, rest, first,
    H: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    held = den > SMALLEST
    safe = tl.where(held, den, 1.0)
    if NORMALIZE:
        y = tl.where(held[:, None], num, 0.0) / safe[:, None]
    else:
        half = unscale(M, past, rest)[:, None]
        y = num * half * half
    store_tile(y_ptr, row, h, kept, y, H)
    if first:
        log_normalizer = tl.where(held, ((M + past) + rest) + tl.log(safe), EMPTY)
        tl.store(n_ptr + row, log_normalizer, mask=kept)
        tl.store(den_ptr + row, den, mask=kept)


@triton.jit
def outputs_kernel(
    q_ptr, k_ptr, v_ptr, past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr, kvs_ptr, zs_ptr,
    y_ptr, n_ptr, den_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk from the state before it: a program per head, chunk, ``HEADS`` query heads and ``BH``."""
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    n = tl.program_id(1)
    block, first = tl.program_id(2) // tl.cdiv(H, BH), tl.program_id(2) % tl.cdiv(H, BH) == 0
    h = (tl.program_id(2) % tl.cdiv(H, BH)) * BH + tl.arange(0, BH)
    place = tl.arange(0, C)
    x = tl.arange(0, HEADS * C)
    i, r = x % C, block * HEADS + x // C
    kept = (n * C + i < T) & (r < N // S)
    row = (batch * T + n * C + i) * N + s * (N // S) + r
    t = n * C + place
    at = head * chunks + n

    scores = tl.zeros((HEADS * C, C), tl.float32)
    num = tl.zeros((HEADS * C, BH), tl.float32)
    reads_z = tl.zeros((HEADS * C,), tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        q = load_tile(q_ptr, row, f, kept, F)
        key = load_tile_t(k_ptr, (batch * T + t) * S + s, f, t < T, F)
        kv = load_tile(kvs_ptr, at * F + f, h, f < F, H)
        z = tl.load(zs_ptr + at * F + f, mask=f < F, other=0.0)
        scores = tl.dot(q, key, scores, input_precision=PRECISION)
        num = tl.dot(q, kv, num, input_precision=PRECISION)
        reads_z += tl.sum(q.to(tl.float32) * z[None, :], 1)

    m = tl.load(scale_ptr + head * (chunks + 1) + n)
    borders, M = row_scale(top_ptr, borders_ptr, at * C + i, m)
    reads = carried(borders, M, m)
    seen = (i[:, None] >= place[None, :]) & (borders[:, None] == tl.load(borders_ptr + at * C + place)[None, :])
    hi, lo = tl.load(hi_ptr + at * C + place), tl.load(lo_ptr + at * C + place)
    w = scores * pair(hi[None, :], lo[None, :], M[:, None], seen)
    den = tl.sum(w, 1) + reads * reads_z
    v = load_tile(v_ptr, (batch * T + t) * K + s // (S // K), h, t < T, H)
    num = tl.dot(w.to(v.dtype), v, num * reads[:, None], input_precision=PRECISION)
    past, rest = tl.load(past_ptr + at * C + i), tl.load(rest_ptr + at * C + i)
    _write(y_ptr, n_ptr, den_ptr, row, kept, h, num, den, M, past, rest, first, H, NORMALIZE)


@triton.jit
def fused_kernel(
    q_ptr, k_ptr, v_ptr, kv_ptr, z_ptr, past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr,
    y_ptr, n_ptr, den_ptr, kv_out_ptr, z_out_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and states in one pass: a program per head and ``BH`` columns carries its state from chunk to chunk."""
    head = tl.program_id(1).to(tl.int64)
    batch, s = head // S, head % S
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    first = tl.program_id(0) == 0
    f = tl.arange(0, BF)
    place = tl.arange(0, C)
    x = tl.arange(0, HEADS * C)
    i = x % C
    kv = load_tile(kv_ptr, head * F + f, h, f < F, H)
    z = tl.load(z_ptr + head * F + f, mask=f < F, other=0.0)
    for n in range(chunks):
        at = head * chunks + n
        t = n * C + place
        key = load_tile_t(k_ptr, (batch * T + t) * S + s, f, t < T, F)
        v = load_tile(v_ptr, (batch * T + t) * K + s // (S // K), h, t < T, H)
        scale = scale_ptr + head * (chunks + 1) + n
        m = tl.load(scale)
        borders, M = row_scale(top_ptr, borders_ptr, at * C + i, m)
        past, rest = tl.load(past_ptr + at * C + i), tl.load(rest_ptr + at * C + i)
        reads = carried(borders, M, m)
        seen = (i[:, None] >= place[None, :]) & (borders[:, None] == tl.load(borders_ptr + at * C + place)[None, :])
        hi, lo = tl.load(hi_ptr + at * C + place), tl.load(lo_ptr + at * C + place)
        decays = pair(hi[None, :], lo[None, :], M[:, None], seen)
        rounded = kv.to(v.dtype)
        for block in tl.static_range(0, N // S, HEADS):
            r = block + x // C
            kept = (n * C + i < T) & (r < N // S)
            row = (batch * T + n * C + i) * N + s * (N // S) + r
            q = load_tile(q_ptr, row, f, kept, F)
            w = decays * tl.dot(q, key, input_precision=PRECISION)
            num = reads[:, None] * tl.dot(q, rounded, input_precision=PRECISION)
            num = tl.dot(w.to(v.dtype), v, num, input_precision=PRECISION)
            den = tl.sum(w, 1) + reads * tl.sum(q.to(tl.float32) * z[None, :], 1)
            _write(y_ptr, n_ptr, den_ptr, row, kept, h, num, den, M, past, rest, first, H, NORMALIZE)
        take, keep = into_state(past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale, at * C, C)
        taken = key.to(tl.float32) * take[None, :]
        kv = tl.dot(taken.to(v.dtype), v, keep * kv, input_precision=PRECISION)
        z = keep * z + tl.sum(taken, 1)
    store_tile(kv_out_ptr, head * F + f, h, f < F, kv, H)
    if first:
        tl.store(z_out_ptr + head * F + f, z, mask=f < F)
