"""Triton: gradients. The state's cotangent is carried from the last chunk to the first; then chunks are independent.

A pair's weight has the cotangent ``a_i (dy_i·v_j) + b_i``, where ``a`` divides a row by its sum (or scales it by
``e^m``). The kernel that goes by rows gives the queries' gradients and finds ``b``; it comes first. ``b`` has
``y·dy`` in it, found from the same products as the weights' cotangents and not from a rounded ``y``, whose error would
be the same for every key. The exponents' cotangents ``e_ij`` reach gate ``t`` as ``Σ_{i ≥ t} Σ_{j < t} e_ij``, summed as
it stands.
"""

import triton
import triton.language as tl

from pallas_kernels.log_gate_attention.triton.decay import SMALLEST, carried, into_state, pair, row_scale, unscale
from pallas_kernels.log_gate_attention.triton.forward import load_tile, load_tile_t, store_tile


@triton.jit
def _inverse(den_ptr, row, kept):
    den = tl.load(den_ptr + row, mask=kept, other=0.0)
    held = den > SMALLEST
    return tl.where(held, 1.0 / tl.where(held, den, 1.0), 0.0)


@triton.jit
def _row_factor(den_ptr, past_ptr, rest_ptr, row, at, kept, M, NORMALIZE: tl.constexpr):
    """``a``: what a row's weighted sum of values is multiplied by."""
    if NORMALIZE:
        a = _inverse(den_ptr, row, kept)
    else:
        half = unscale(M, tl.load(past_ptr + at), tl.load(rest_ptr + at))
        a = half * half
    return a


@triton.jit
def state_cotangents_kernel(
    q_ptr, dy_ptr, b_ptr, den_ptr, dkv_ptr, dz_ptr,
    past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr,
    dkvs_ptr, dzs_ptr, dkv_out_ptr, dz_out_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cotangents of the state after each chunk and before the first: a program per head and ``[BF, BH]`` block."""
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    h = tl.program_id(2) * BH + tl.arange(0, BH)
    x = tl.arange(0, HEADS * C)
    i = x % C
    first = tl.program_id(2) == 0
    dkv = load_tile(dkv_ptr, head * F + f, h, f < F, H)
    dz = tl.load(dz_ptr + head * F + f, mask=f < F, other=0.0)
    for back in range(chunks):
        n = chunks - 1 - back
        at = head * chunks + n
        store_tile(dkvs_ptr, at * F + f, h, f < F, dkv, H)
        if first:
            tl.store(dzs_ptr + at * F + f, dz, mask=f < F)
        scale = scale_ptr + head * (chunks + 1) + n
        _, keep = into_state(past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale, at * C, C)
        m = tl.load(scale)
        borders, M = row_scale(top_ptr, borders_ptr, at * C + i, m)
        reads = carried(borders, M, m)
        dkv, dz = keep * dkv, keep * dz
        for block in tl.static_range(0, N // S, HEADS):
            r = block + x // C
            kept = (n * C + i < T) & (r < N // S)
            row = (batch * T + n * C + i) * N + s * (N // S) + r
            a = _row_factor(den_ptr, past_ptr, rest_ptr, row, at * C + i, kept, M, NORMALIZE)
            b = tl.load(b_ptr + row, mask=kept, other=0.0)
            q = load_tile_t(q_ptr, row, f, kept, F).to(tl.float32)
            dy = load_tile(dy_ptr, row, h, kept, H)
            dkv = tl.dot((q * (reads * a)[None, :]).to(dy.dtype), dy, dkv, input_precision=PRECISION)
            dz += tl.sum(q * (reads * b)[None, :], 1)
    store_tile(dkv_out_ptr, head * F + f, h, f < F, dkv, H)
    if first:
        tl.store(dz_out_ptr + head * F + f, dz, mask=f < F)


@triton.jit
def _on_state(
    dy_ptr, kvs_ptr, row, kept, state_row, f, rows: tl.constexpr,
    F: tl.constexpr, H: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dy·kvᵀ`` of each row: ``[rows, BF]``."""
    out = tl.zeros((rows, BF), tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        dy = load_tile(dy_ptr, row, h, kept, H)
        kv = load_tile_t(kvs_ptr, state_row * F + f, h, f < F, H)
        out = tl.dot(dy, kv, out, input_precision=PRECISION)
    return out


@triton.jit
def rows_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, dn_ptr, den_ptr,
    past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr, kvs_ptr, zs_ptr,
    dq_ptr, b_ptr, dg_ptr, dc_ptr, T, chunks,
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
    kept = (n * C + i < T) & (r < N // S)
    row = (batch * T + n * C + i) * N + s * (N // S) + r
    t = n * C + place
    at = head * chunks + n
    key_row, value_row = (batch * T + t) * S + s, (batch * T + t) * K + s // (S // K)

    on_values = tl.zeros((HEADS * C, C), tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        dy = load_tile(dy_ptr, row, h, kept, H)
        v = load_tile_t(v_ptr, value_row, h, t < T, H)
        on_values = tl.dot(dy, v, on_values, input_precision=PRECISION)
    scores = tl.zeros((HEADS * C, C), tl.float32)
    reads_kv = tl.zeros((HEADS * C,), tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        q = load_tile(q_ptr, row, f, kept, F)
        k = load_tile_t(k_ptr, key_row, f, t < T, F)
        scores = tl.dot(q, k, scores, input_precision=PRECISION)
        if NORMALIZE:
            on_state = _on_state(dy_ptr, kvs_ptr, row, kept, at, f, HEADS * C, F, H, BF, BH, PRECISION)
            reads_kv += tl.sum(q.to(tl.float32) * on_state, 1)

    m = tl.load(scale_ptr + head * (chunks + 1) + n)
    borders, M = row_scale(top_ptr, borders_ptr, at * C + i, m)
    reads = carried(borders, M, m)
    seen = (i[:, None] >= place[None, :]) & (borders[:, None] == tl.load(borders_ptr + at * C + place)[None, :])
    hi, lo = tl.load(hi_ptr + at * C + place), tl.load(lo_ptr + at * C + place)
    decays = pair(hi[None, :], lo[None, :], M[:, None], seen)
    a = _row_factor(den_ptr, past_ptr, rest_ptr, row, at * C + i, kept, M, NORMALIZE)
    dn = tl.load(dn_ptr + row, mask=kept, other=0.0)
    if NORMALIZE:
        b = (dn - (tl.sum(scores * decays * on_values, 1) + reads * reads_kv) * a) * a
    else:
        b = dn * _inverse(den_ptr, row, kept)
    tl.store(b_ptr + row, b, mask=kept)

    dscores = decays * (a[:, None] * on_values + b[:, None])
    exponent = scores * dscores
    rounded = dscores.to(q_ptr.dtype.element_ty)
    since = tl.zeros((HEADS * C,), tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        on_state = _on_state(dy_ptr, kvs_ptr, row, kept, at, f, HEADS * C, F, H, BF, BH, PRECISION)
        z = tl.load(zs_ptr + at * F + f, mask=f < F, other=0.0)
        on_state = reads[:, None] * (a[:, None] * on_state + b[:, None] * z[None, :])
        q = load_tile(q_ptr, row, f, kept, F)
        since += tl.sum(q.to(tl.float32) * on_state, 1)
        k = load_tile(k_ptr, key_row, f, t < T, F)
        dq = tl.dot(rounded, k, on_state, input_precision=PRECISION)
        store_tile(dq_ptr, row, f, kept, dq, F)

    if HEADS > 1:
        exponent = tl.sum(tl.reshape(exponent, (HEADS, C, C)), 0)
        since = tl.sum(tl.reshape(since, (HEADS, C)), 0)
    below = tl.cumsum(exponent, 0, reverse=True)
    dg = tl.sum(tl.where(place[None, :] < place[:, None], below, 0.0), 1) + tl.cumsum(since, 0, reverse=True)
    out = (block * tl.num_programs(0) + head) * chunks * C + t
    tl.store(dg_ptr + out, dg)
    tl.store(dc_ptr + out, tl.sum(exponent, 0))


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, b_ptr, den_ptr,
    past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr, kvs_ptr, zs_ptr, dkvs_ptr, dzs_ptr,
    dk_ptr, dv_ptr, dg_ptr, dc_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values of one chunk, and what reaches gates and key scales through the next state.

    ``dv`` is ``[B, T, S, H]``: state heads that share values each give their part.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    n = tl.program_id(1)
    place = tl.arange(0, C)
    f, h = tl.arange(0, BF), tl.arange(0, BH)
    t = n * C + place
    at = head * chunks + n
    scale = scale_ptr + head * (chunks + 1) + n

    k = load_tile(k_ptr, (batch * T + t) * S + s, f, t < T, F)
    v = load_tile(v_ptr, (batch * T + t) * K + s // (S // K), h, t < T, H)
    m = tl.load(scale)
    borders, M = row_scale(top_ptr, borders_ptr, at * C + place, m)
    hi, lo = tl.load(hi_ptr + at * C + place), tl.load(lo_ptr + at * C + place)
    seen = (place[None, :] >= place[:, None]) & (borders[None, :] == borders[:, None])
    decays = pair(hi[:, None], lo[:, None], M[None, :], seen)

    take, keep = into_state(past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale, at * C, C)
    dkv = load_tile(dkvs_ptr, at * F + f, h, f < F, H)
    dz = tl.load(dzs_ptr + at * F + f, mask=f < F, other=0.0)
    taken = k.to(tl.float32) * take[:, None]
    dk = take[:, None] * (tl.dot(v, tl.trans(dkv), input_precision=PRECISION) + dz[None, :])
    dv = tl.dot(taken.to(v.dtype), dkv, input_precision=PRECISION)
    into = tl.sum(k.to(tl.float32) * dk, 1)
    kv = load_tile(kvs_ptr, at * F + f, h, f < F, H).to(tl.float32)
    z = tl.load(zs_ptr + at * F + f, mask=f < F, other=0.0)
    kept = keep * (tl.sum(tl.sum(kv * dkv.to(tl.float32), 1), 0) + tl.sum(z * dz, 0))
    dg = tl.sum(tl.where(place[None, :] < place[:, None], into[None, :], 0.0), 1) + kept
    tl.store(dg_ptr + at * C + place, dg)
    tl.store(dc_ptr + at * C + place, into)

    for r in range(N // S):
        row = (batch * T + t) * N + s * (N // S) + r
        a = _row_factor(den_ptr, past_ptr, rest_ptr, row, at * C + place, t < T, M, NORMALIZE)
        b = tl.load(b_ptr + row, mask=t < T, other=0.0)
        q = load_tile(q_ptr, row, f, t < T, F)
        dy = load_tile(dy_ptr, row, h, t < T, H)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights = scores * decays * a[None, :]
        dv = tl.dot(weights.to(dy.dtype), dy, dv, input_precision=PRECISION)
        on_values = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        dscores = decays * (a[None, :] * on_values + b[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    store_tile(dk_ptr, (batch * T + t) * S + s, f, t < T, dk, F)
    store_tile(dv_ptr, (batch * T + t) * S + s, h, t < T, dv, H)
