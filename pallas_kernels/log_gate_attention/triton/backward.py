"""Triton: gradients. The state's cotangent is carried from the last chunk to the first; then chunks are independent.

A pair's weight has the cotangent ``a_i (dy_i·v_j) + b_i``, where ``a`` divides a row by its sum (or scales it by
``e^m``). The kernel that goes by rows gives the queries' gradients and finds ``b``; it comes first. ``b`` has
``y·dy`` in it, found from the same products as the weights' cotangents and not from a rounded ``y``, whose error would
be the same for every key. The cotangents ``e_ij`` of exponents reach gate ``t`` as ``Σ_{i ≥ t} Σ_{j < t} e_ij``, summed
as it stands. They nearly cancel, so states and their cotangents enter them with what rounding took.
"""

import triton
import triton.language as tl

from pallas_kernels.log_gate_attention.triton.decay import pairs, pairs_t, unscale
from pallas_kernels.log_gate_attention.triton.forward import SMALLEST
from pallas_kernels.log_gate_attention.triton.tiles import in_columns, load_tile, load_tile_t, store_tile


@triton.jit
def _inverse(den_ptr, row, rows_in):
    den = tl.load(den_ptr + row, mask=rows_in, other=0.0)
    held = den > SMALLEST
    return tl.where(held, 1.0 / tl.where(held, den, 1.0), 0.0)


@triton.jit
def _row_factor(den_ptr, own_ptr, row, rows_in, NORMALIZE: tl.constexpr):
    """``a``: what a row's weighted sum of values is multiplied by."""
    if NORMALIZE:
        a = _inverse(den_ptr, row, rows_in)
    else:
        half = unscale(tl.load(own_ptr))
        a = half * half
    return a


@triton.jit
def _on_state(
    dy_ptr, kvs_ptr, row, rows_in, f, ROWS: tl.constexpr,
    F: tl.constexpr, H: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dy·kvᵀ`` of each row: ``[ROWS, BF]``."""
    out = tl.zeros((ROWS, BF), tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        dy = load_tile(dy_ptr, row, h, rows_in, H)
        kv = load_tile_t(kvs_ptr, f, h, f < F, H)
        out = tl.dot(dy, kv, out, input_precision=PRECISION)
    return out


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, dn_ptr, den_ptr, hi_ptr, lo_ptr, M_ptr, own_ptr, start_ptr, reads_ptr,
    kvs_ptr, zs_ptr, dq_ptr, b_ptr, dg_ptr, dc_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, ``b``, and what reaches gates and key scales through outputs; of ``HEADS`` query heads.

    ``dg`` and ``dc`` are ``[blocks of query heads, B, S, L]``, to be summed over the first axis.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    n, block = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, C)
    x = tl.arange(0, HEADS * C)
    i, r = x % C, block * HEADS + x // C
    rows_in, keys_in = (n * C + i < T) & (r < N // S), n * C + place < T
    token = batch * T + n * C
    first_row = token * N + s * (N // S)
    row = i * N + r
    at = head * chunks + n
    q_ptr += first_row * F
    dq_ptr += first_row * F
    dy_ptr += first_row * H
    k_ptr += (token * S + s) * F
    kvs_ptr += at * F * H
    v_ptr += (token * K + s // (S // K)) * H

    on_values = tl.zeros((HEADS * C, C), tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        dy = load_tile(dy_ptr, row, h, rows_in, H)
        v = load_tile_t(v_ptr, place * K, h, keys_in, H)
        on_values = tl.dot(dy, v, on_values, input_precision=PRECISION)
    scores = tl.zeros((HEADS * C, C), tl.float32)
    reads_kv = tl.zeros((HEADS * C,), tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        q = load_tile(q_ptr, row, f, rows_in, F)
        k = load_tile_t(k_ptr, place * S, f, keys_in, F)
        scores = tl.dot(q, k, scores, input_precision=PRECISION)
        if NORMALIZE:
            on_state = _on_state(dy_ptr, kvs_ptr, row, rows_in, f, HEADS * C, F, H, BF, BH, PRECISION)
            reads_kv += tl.sum(q.to(tl.float32) * on_state, 1)

    decays = pairs(hi_ptr, lo_ptr, M_ptr, start_ptr, at * C, i, C)
    reads = tl.load(reads_ptr + at * C + i)
    a = _row_factor(den_ptr + first_row, own_ptr + at * C + i, row, rows_in, NORMALIZE)
    dn = tl.load(dn_ptr + first_row + row, mask=rows_in, other=0.0)
    if NORMALIZE:
        b = (dn - (tl.sum(scores * decays * on_values, 1) + reads * reads_kv) * a) * a
    else:
        b = dn * _inverse(den_ptr + first_row, row, rows_in)
    tl.store(b_ptr + first_row + row, b, mask=rows_in)

    dscores = decays * (a[:, None] * on_values + b[:, None])
    rounded = dscores.to(q_ptr.dtype.element_ty)
    exponent = scores * dscores
    since = tl.zeros((HEADS * C,), tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        on_state = _on_state(dy_ptr, kvs_ptr, row, rows_in, f, HEADS * C, F, H, BF, BH, PRECISION)
        z = tl.load(zs_ptr + at * F + f, mask=f < F, other=0.0)
        on_state = reads[:, None] * (a[:, None] * on_state + b[:, None] * z[None, :])
        q = load_tile(q_ptr, row, f, rows_in, F)
        since += tl.sum(q.to(tl.float32) * on_state, 1)
        k = load_tile(k_ptr, place * S, f, keys_in, F)
        dq = tl.dot(rounded, k, on_state, input_precision=PRECISION)
        store_tile(dq_ptr, row, f, rows_in, dq, F)

    if HEADS > 1:
        exponent = tl.sum(tl.reshape(exponent, (HEADS, C, C)), 0)
        since = tl.sum(tl.reshape(since, (HEADS, C)), 0)
    below = tl.cumsum(exponent, 0, reverse=True)
    dg = tl.sum(tl.where(place[None, :] < place[:, None], below, 0.0), 1) + tl.cumsum(since, 0, reverse=True)
    out = ((block * tl.num_programs(0) + head) * chunks + n) * C + place
    tl.store(dg_ptr + out, dg)
    tl.store(dc_ptr + out, tl.sum(exponent, 0))


@triton.jit
def cotangents_kernel(
    q_ptr, dy_ptr, b_ptr, den_ptr, dkv_ptr, dz_ptr, own_ptr, reads_ptr, keep_ptr, kvs_ptr, kv_rests_ptr, zs_ptr,
    dkvs_ptr, rests_ptr, dzs_ptr, dkv_out_ptr, dz_out_ptr, kept_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    RESTS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cotangents of the state after each chunk and before the first, kept as ``states_kernel`` keeps states.

    ``kept[blocks of F, blocks of H, B, S, chunks]``, to be summed over the first two axes, is the cotangent of the
    logarithm of ``keep``.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    h = tl.program_id(2) * BH + tl.arange(0, BH)
    x = tl.arange(0, HEADS * C)
    i = x % C
    first = tl.program_id(2) == 0
    dkv = load_tile(dkv_ptr + head * F * H, f, h, f < F, H)
    dz = tl.load(dz_ptr + head * F + f, mask=f < F, other=0.0)
    dz = tl.where(tl.arange(0, 16)[None, :] == 0, dz[:, None], 0.0)
    for back in tl.range(0, chunks, disable_licm=True):
        n = chunks - 1 - back
        at = head * chunks + n
        rounded = dkv.to(dkvs_ptr.dtype.element_ty)
        store_tile(dkvs_ptr + at * F * H, f, h, f < F, rounded, H)
        if RESTS:
            store_tile(rests_ptr + at * F * H, f, h, f < F, dkv - rounded.to(tl.float32), H)
        if first:
            tl.store(dzs_ptr + at * F + f, tl.sum(dz, 1), mask=f < F)
        keep = tl.load(keep_ptr + at)
        dkv, dz = keep * dkv, keep * dz
        kv = load_tile(kvs_ptr + at * F * H, f, h, f < F, H).to(tl.float32)
        if RESTS:
            kv += load_tile(kv_rests_ptr + at * F * H, f, h, f < F, H).to(tl.float32)
        kept = tl.sum(tl.sum(kv * dkv, 1), 0)
        if first:
            z = tl.load(zs_ptr + at * F + f, mask=f < F, other=0.0)
            kept += tl.sum(z * tl.sum(dz, 1), 0)
        blocks = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        tl.store(kept_ptr + (blocks * tl.num_programs(0) + head) * chunks + n, kept)
        reads = tl.load(reads_ptr + at * C + i)
        for block in tl.range(0, N // S, HEADS, disable_licm=True):
            r = block + x // C
            rows_in = (n * C + i < T) & (r < N // S)
            first_row = (batch * T + n * C) * N + s * (N // S)
            row = i * N + r
            a = _row_factor(den_ptr + first_row, own_ptr + at * C + i, row, rows_in, NORMALIZE)
            b = tl.load(b_ptr + first_row + row, mask=rows_in, other=0.0)
            q = load_tile_t(q_ptr + first_row * F, row, f, rows_in, F)
            dy = load_tile(dy_ptr + first_row * H, row, h, rows_in, H)
            scaled = (dy.to(tl.float32) * (reads * a)[:, None]).to(dy.dtype)
            dkv = tl.dot(q, scaled, dkv, input_precision=PRECISION)
            dz = tl.dot(q, in_columns(reads * b, q.dtype), dz, input_precision=PRECISION)
    store_tile(dkv_out_ptr + head * F * H, f, h, f < F, dkv, H)
    if first:
        tl.store(dz_out_ptr + head * F + f, tl.sum(dz, 1), mask=f < F)


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, b_ptr, den_ptr, hi_ptr, lo_ptr, M_ptr, own_ptr, start_ptr, take_ptr,
    dkvs_ptr, rests_ptr, dzs_ptr, dk_ptr, dv_ptr, dg_ptr, dc_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, KEYS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    RESTS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``KEYS`` keys and values, and what reaches gates and key scales through the state after the chunk.

    ``dv`` is ``[B, T, S, H]``: state heads that share values each give their part. ``dg[C / KEYS, B, S, L]`` is to be
    summed over the first axis.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    n, block = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, C)
    j = block * KEYS + tl.arange(0, KEYS)
    f, h = tl.arange(0, BF), tl.arange(0, BH)
    rows_in, keys_in = n * C + place < T, n * C + j < T
    token = batch * T + n * C
    at = head * chunks + n
    k = load_tile(k_ptr + (token * S + s) * F, j * S, f, keys_in, F)
    v = load_tile(v_ptr + (token * K + s // (S // K)) * H, j * K, h, keys_in, H)

    dkv = load_tile(dkvs_ptr + at * F * H, f, h, f < F, H)
    dz = tl.load(dzs_ptr + at * F + f, mask=f < F, other=0.0)
    take = tl.load(take_ptr + at * C + j)
    dv = take[:, None] * tl.dot(k, dkv, input_precision=PRECISION)
    dk = tl.dot(v, tl.trans(dkv), input_precision=PRECISION)
    if RESTS:
        dk = tl.dot(v, load_tile_t(rests_ptr + at * F * H, f, h, f < F, H), dk, input_precision=PRECISION)
    dk = take[:, None] * (dk + dz[None, :])
    into = tl.sum(k.to(tl.float32) * dk, 1)
    tl.store(dc_ptr + at * C + j, into)
    dg = tl.sum(tl.where(j[None, :] < place[:, None], into[None, :], 0.0), 1)
    tl.store(dg_ptr + ((block * tl.num_programs(0) + head) * chunks + n) * C + place, dg)

    for r in tl.range(0, N // S, disable_licm=True):
        first_row = token * N + s * (N // S) + r
        a = _row_factor(den_ptr + first_row, own_ptr + at * C + place, place * N, rows_in, NORMALIZE)
        b = tl.load(b_ptr + first_row + place * N, mask=rows_in, other=0.0)
        q = load_tile(q_ptr + first_row * F, place * N, f, rows_in, F)
        dy = load_tile(dy_ptr + first_row * H, place * N, h, rows_in, H)
        decays = pairs_t(hi_ptr, lo_ptr, M_ptr, start_ptr, at * C, j, C)
        weights = tl.dot(k, tl.trans(q), input_precision=PRECISION) * decays * a[None, :]
        dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
        on_values = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        dscores = decays * (a[None, :] * on_values + b[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    store_tile(dk_ptr + (token * S + s) * F, j * S, f, keys_in, dk, F)
    store_tile(dv_ptr + (token * S + s) * H, j * S, h, keys_in, dv, H)
