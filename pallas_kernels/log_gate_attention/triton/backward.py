"""Triton: gradients. The state's cotangent is carried from the last chunk to the first; then chunks are independent.

A pair's weight has the cotangent ``a_i (dy_i·v_j) + b_i``, where ``a`` divides a row by its sum (or scales it by
``e^m``). The kernel that goes by rows gives the queries' gradients and finds both; it comes first. ``b`` has
``y·dy`` in it, found from the same products as the weights' cotangents and not from a rounded ``y``, whose error would
be the same for every key. The cotangents ``e_ij`` of exponents reach gate ``t`` as ``Σ_{i ≥ t} Σ_{j < t} e_ij``, summed
as it stands. Where few tokens make up the memory, what they and the queries' gradients are sums of nearly cancels, so
states, their cotangents and what adds up to these enter with what rounding took.
"""

# Triton compiles these functions from their source; what it accepts is not what its annotations say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from pallas_kernels.log_gate_attention.triton.decay import pairs, pairs_t, unscale
from pallas_kernels.log_gate_attention.triton.features import features, features_t, scores, scores_t, to_scores
from pallas_kernels.log_gate_attention.triton.forward import SMALLEST, block_of_features
from pallas_kernels.log_gate_attention.triton.tiles import in_columns, in_two, load_tile, load_tile_t, store_tile


@triton.jit
def _on_state(
    dy_ptr, kvs_ptr, part_size, row, f, inside, ROWS: tl.constexpr,
    H: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dy·kvᵀ`` of each row: ``[ROWS, BF]``."""
    out = tl.zeros((ROWS, BF), tl.float32)
    steps: tl.constexpr = (H + BH - 1) // BH
    for step in tl.range(0, steps * PARTS, disable_licm=True):
        h = (step % steps) * BH + tl.arange(0, BH)
        dy = load_tile(dy_ptr, row, h, None, H)
        kv = load_tile_t(kvs_ptr + (step // steps) * part_size, f, h, inside, H)
        out = tl.dot(dy, kv, out, input_precision=PRECISION)
    return out


@triton.jit
def rows_kernel(
    q_ptr, q_map_ptr, q_shift_ptr, k_ptr, k_map_ptr, k_shift_ptr, v_ptr, dy_ptr, dn_ptr,
    hi_ptr, lo_ptr, M_ptr, own_ptr, start_ptr, reads_ptr, kvs_ptr, zs_ptr,
    dq_ptr, a_ptr, b_ptr, dg_ptr, dc_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    X: tl.constexpr, BX: tl.constexpr, SOFTMAX: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, PLACES: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    PARTS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``PLACES`` queries of ``HEADS`` heads, their ``a`` and ``b``; by outputs, of gates and key scales.

    ``dq`` holds the cotangents of scores where there is a map, and a tile then holds all ``E``; a tile of all features
    given spares a second product with the state. ``dg`` and ``dc`` are ``[blocks of queries, B, S, L]``, to be
    summed over the first axis.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    n, block = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, C)
    x = tl.arange(0, HEADS * PLACES)
    parts: tl.constexpr = C // PLACES
    i = (block % parts) * PLACES + x % PLACES
    last = T - 1 - n * C
    key_row = tl.minimum(place, last)
    token = batch * T + n * C
    first_row = token * N + s * (N // S)
    at = head * chunks + n
    E: tl.constexpr = F if X == 0 else F // 2
    HALVES: tl.constexpr = 1 if X == 0 else 2
    STEP: tl.constexpr = S if X == 0 else K
    WHOLE: tl.constexpr = X == 0 and BF >= F
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    batches = tl.num_programs(0).to(tl.int64) // S
    q_ptr += first_row * (F if X == 0 else X)
    q_map_ptr += (s * (N // S) + block // parts) * X * E
    q_shift_ptr += first_row
    k_shift_ptr += token * S + s
    k_map_ptr += s * X * E
    dq_ptr += first_row * E
    dy_ptr += first_row * H
    k_ptr += (token * S + s) * F if X == 0 else (token * K + s // (S // K)) * X
    kvs_ptr += at * F * H
    zs_ptr += at * F
    part_size = tl.num_programs(0).to(tl.int64) * chunks * F * H
    v_ptr += (token * K + s // (S // K)) * H

    r = (block // parts) * HEADS + x // PLACES
    rows_in = (i <= last) & (r < N // S)
    row = tl.minimum(i, last) * N + tl.minimum(r, N // S - 1)
    on_values = tl.zeros((HEADS * PLACES, C), tl.float32)
    for start in tl.range(0, H, BH, disable_licm=True):
        h = start + tl.arange(0, BH)
        dy = load_tile(dy_ptr, row, h, None, H)
        v = load_tile_t(v_ptr, key_row * K, h, None, H)
        on_values = tl.dot(dy, v, on_values, input_precision=PRECISION)
    if WHOLE:
        f = tl.arange(0, BF)
        inside = None if BF == F else f < F
        q = load_tile(q_ptr, row, f, None, F)
        qk = tl.dot(q, load_tile_t(k_ptr, key_row * S, f, None, F), input_precision=PRECISION)
        z = tl.load(zs_ptr + f) if BF == F else tl.load(zs_ptr + f, mask=f < F, other=0.0)
        reads_z = tl.sum(tl.dot(q, in_columns(z, dtype), input_precision=PRECISION), 1)
        on_state = _on_state(dy_ptr, kvs_ptr, part_size, row, f, inside, HEADS * PLACES, H, BF, BH, PARTS, PRECISION)
        reads_kv = tl.sum(q.to(tl.float32) * on_state, 1)
    else:
        qk = tl.zeros((HEADS * PLACES, C), tl.float32)
        reads_kv = tl.zeros((HEADS * PLACES,), tl.float32)
        reads_z = tl.zeros((HEADS * PLACES,), tl.float32)
        for start in range(0, E, BF):
            e = start + tl.arange(0, BF)
            s_q = scores(q_ptr, q_map_ptr, row, e, E, X, BX, PRECISION)
            s_k = scores_t(k_ptr, k_map_ptr, key_row * STEP, e, E, X, BX, PRECISION)
            for half in tl.range(0, HALVES, disable_licm=True):
                q = features(s_q, q_shift_ptr + half * batches * T * N, row, e, half, E, X, dtype)
                k = features_t(s_k, k_shift_ptr + half * batches * T * S, key_row * S, e, half, E, X, dtype)
                f = half * E + e
                qk = tl.dot(q, k, qk, input_precision=PRECISION)
                sums = in_columns(tl.load(zs_ptr + f, mask=e < E, other=0.0), dtype)
                reads_z += tl.sum(tl.dot(q, sums, input_precision=PRECISION), 1)
                on_state = _on_state(
                    dy_ptr, kvs_ptr, part_size, row, f, e < E, HEADS * PLACES, H, BF, BH, PARTS, PRECISION
                )
                reads_kv += tl.sum(q.to(tl.float32) * on_state, 1)

    decays = pairs(hi_ptr, lo_ptr, M_ptr, start_ptr, at * C, i, C)
    reads = tl.load(reads_ptr + at * C + i)
    w = qk * decays
    den = tl.sum(w, 1) + reads * reads_z
    nonempty = rows_in & (den > SMALLEST)
    over = tl.where(nonempty, 1.0 / tl.where(nonempty, den, 1.0), 0.0)
    dn = tl.load(dn_ptr + first_row + row, mask=rows_in, other=0.0)
    if NORMALIZE:
        a = over
        b = (dn - (tl.sum(w * on_values, 1) + reads * reads_kv) * over) * over
    else:
        half_level = unscale(tl.load(own_ptr + at * C + i))
        a = tl.where(rows_in, half_level * half_level, 0.0)
        b = dn * over
    tl.store(a_ptr + first_row + row, a, mask=rows_in)
    tl.store(b_ptr + first_row + row, b, mask=rows_in)

    dw = a[:, None] * on_values + b[:, None]
    exponents = w * dw
    since = reads * (a * reads_kv + b * reads_z)
    dscores = (decays * dw).to(dtype)
    if WHOLE:
        carried = reads[:, None] * (a[:, None] * on_state + b[:, None] * z[None, :])
        k = load_tile(k_ptr, key_row * S, f, None, F)
        store_tile(dq_ptr, row, f, rows_in, tl.dot(dscores, k, carried, input_precision=PRECISION), F)
    else:
        for start in range(0, E, BF):
            e = start + tl.arange(0, BF)
            s_q = scores(q_ptr, q_map_ptr, row, e, E, X, BX, PRECISION)
            s_k = scores(k_ptr, k_map_ptr, key_row * STEP, e, E, X, BX, PRECISION)
            out = tl.zeros((HEADS * PLACES, BF), tl.float32)
            for half in tl.range(0, HALVES, disable_licm=True):
                f = half * E + e
                on_state = _on_state(
                    dy_ptr, kvs_ptr, part_size, row, f, e < E, HEADS * PLACES, H, BF, BH, PARTS, PRECISION
                )
                z = tl.load(zs_ptr + f, mask=e < E, other=0.0)
                carried = reads[:, None] * (a[:, None] * on_state + b[:, None] * z[None, :])
                k = features(s_k, k_shift_ptr + half * batches * T * S, key_row * S, e, half, E, X, dtype)
                dq = tl.dot(dscores, k, carried, input_precision=PRECISION)
                if X == 0:
                    out = dq
                else:
                    q = features(s_q, q_shift_ptr + half * batches * T * N, row, e, half, E, X, dtype)
                    out += to_scores(q, dq, half, SOFTMAX)
            store_tile(dq_ptr, row, e, rows_in, out, E)

    # Sums over rows from each place on, of all heads; from the first on they are what reaches the keys.
    later = tl.where(i[None, :] >= place[:, None], 1.0, 0.0).to(dtype)
    if dtype == tl.float32:
        below = tl.dot(later, exponents, input_precision=PRECISION)
    else:
        high, low = in_two(exponents, dtype)
        below = tl.dot(later, low, tl.dot(later, high, input_precision=PRECISION), input_precision=PRECISION)
    past = tl.sum(tl.dot(later, in_columns(since, dtype), input_precision=PRECISION), 1)
    dg = tl.sum(tl.where(place[None, :] < place[:, None], below, 0.0), 1) + past
    out = ((block * tl.num_programs(0) + head) * chunks + n) * C
    tl.store(dg_ptr + out + place, dg)
    first = (place[:, None] == 0) & (place[None, :] >= 0)
    tl.store(dc_ptr + out + place[None, :] + tl.zeros((C, 1), tl.int32), below, mask=first)


@triton.jit
def cotangents_kernel(
    q_ptr, q_map_ptr, q_shift_ptr, dy_ptr, a_ptr, b_ptr, dkv_ptr, dz_ptr, reads_ptr, keep_ptr,
    kvs_ptr, zs_ptr, dkvs_ptr, dzs_ptr, dkv_out_ptr, dz_out_ptr, kept_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, F: tl.constexpr, H: tl.constexpr, X: tl.constexpr, BX: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cotangents of the state after each chunk and before the first, kept as ``states_kernel`` keeps states.

    ``kept[blocks of F, blocks of H, B, S, chunks]``, to be summed over the first two axes, is the cotangent of the
    logarithm of ``keep``.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    half, e, f, inside = block_of_features(tl.program_id(1), F, BF, X)
    E: tl.constexpr = F if X == 0 else F // 2
    batches = tl.num_programs(0).to(tl.int64) // S
    h = tl.program_id(2) * BH + tl.arange(0, BH)
    x = tl.arange(0, HEADS * C)
    i = x % C
    first = tl.program_id(2) == 0
    part_size = tl.num_programs(0).to(tl.int64) * chunks * F * H
    dkv = load_tile(dkv_ptr + head * F * H, f, h, inside, H)
    dz = tl.load(dz_ptr + head * F + f, mask=inside, other=0.0)
    for back in tl.range(0, chunks, disable_licm=True):
        n = chunks - 1 - back
        at = head * chunks + n
        if PARTS > 1:
            high, rest = in_two(dkv, dkvs_ptr.dtype.element_ty)
            store_tile(dkvs_ptr + at * F * H, f, h, inside, high, H)
            store_tile(dkvs_ptr + part_size + at * F * H, f, h, inside, rest, H)
        else:
            store_tile(dkvs_ptr + at * F * H, f, h, inside, dkv, H)
        if first:
            tl.store(dzs_ptr + at * F + f, dz, mask=inside)
        keep = tl.load(keep_ptr + at)
        dkv, dz = keep * dkv, keep * dz
        kv = load_tile(kvs_ptr + at * F * H, f, h, inside, H).to(tl.float32)
        if PARTS > 1:
            kv += load_tile(kvs_ptr + part_size + at * F * H, f, h, inside, H).to(tl.float32)
        kept = tl.sum(tl.sum(kv * dkv, 1), 0)
        if first:
            z = tl.load(zs_ptr + at * F + f, mask=inside, other=0.0)
            kept += tl.sum(z * dz, 0)
        blocks = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
        tl.store(kept_ptr + (blocks * tl.num_programs(0) + head) * chunks + n, kept)
        reads = tl.load(reads_ptr + at * C + i)
        for block in tl.range(0, N // S, HEADS, disable_licm=True):
            r = block + x // C
            rows_in = (n * C + i < T) & (r < N // S)
            first_row = (batch * T + n * C) * N + s * (N // S)
            row = tl.minimum(i, T - 1 - n * C) * N + tl.minimum(r, N // S - 1)
            a = tl.load(a_ptr + first_row + row, mask=rows_in, other=0.0)
            b = tl.load(b_ptr + first_row + row, mask=rows_in, other=0.0)
            q_map = q_map_ptr + (s * (N // S) + block) * X * E
            q = scores_t(q_ptr + first_row * (F if X == 0 else X), q_map, row, e, E, X, BX, PRECISION)
            shift = q_shift_ptr + half * batches * T * N + first_row
            q = features_t(q, shift, row, e, half, E, X, dy_ptr.dtype.element_ty)
            dy = load_tile(dy_ptr + first_row * H, row, h, None, H)
            pulled = dy.to(tl.float32) * (reads * a)[:, None]
            if PARTS > 1:
                pulled, left = in_two(pulled, dy.dtype)
                dkv = tl.dot(q, pulled, dkv, input_precision=PRECISION)
                dkv = tl.dot(q, left, dkv, input_precision=PRECISION)
            else:
                dkv = tl.dot(q, pulled.to(dy.dtype), dkv, input_precision=PRECISION)
            dz += tl.sum(tl.dot(q, in_columns(reads * b, q.dtype), input_precision=PRECISION), 1)
    store_tile(dkv_out_ptr + head * F * H, f, h, inside, dkv, H)
    if first:
        tl.store(dz_out_ptr + head * F + f, dz, mask=inside)


@triton.jit
def _through_state(
    k, v, dv, take, dkvs_ptr, part_size, dzs_ptr, f, h, inside,
    H: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the state after the chunk gives to keys, values (added to ``dv``) and the keys' weights in it."""
    dkv = load_tile(dkvs_ptr, f, h, inside, H)
    dv += take[:, None] * tl.dot(k, dkv, input_precision=PRECISION)
    dk = tl.dot(v, tl.trans(dkv), input_precision=PRECISION)
    if PARTS > 1:
        dk = tl.dot(v, load_tile_t(dkvs_ptr + part_size, f, h, inside, H), dk, input_precision=PRECISION)
    dk = take[:, None] * (dk + tl.load(dzs_ptr + f, mask=inside, other=0.0)[None, :])
    return dk, dv, tl.sum(k.to(tl.float32) * dk, 1)


@triton.jit
def keys_kernel(
    q_ptr, q_map_ptr, q_shift_ptr, k_ptr, k_map_ptr, k_shift_ptr, v_ptr, dy_ptr, a_ptr, b_ptr,
    hi_ptr, lo_ptr, M_ptr, start_ptr, take_ptr, dkvs_ptr, dzs_ptr,
    dk_ptr, dv_ptr, dg_ptr, dc_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    X: tl.constexpr, BX: tl.constexpr, SOFTMAX: tl.constexpr,
    C: tl.constexpr, PLACES: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``PLACES`` keys and values, and what reaches gates and key scales through the state after the chunk.

    ``dk`` holds the cotangents of scores where there is a map, and a tile then holds all ``E``. ``dv`` is
    ``[B, T, S, H]``: state heads that share values each give their part. ``dg[C / PLACES, B, S, L]`` is to be summed
    over the first axis.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    n, block = tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, C)
    j = block * PLACES + tl.arange(0, PLACES)
    e, h = tl.arange(0, BF), tl.arange(0, BH)
    rows_in, keys_in, last = n * C + place < T, n * C + j < T, T - 1 - n * C
    key_row = tl.minimum(j, last)
    token = batch * T + n * C
    at = head * chunks + n
    E: tl.constexpr = F if X == 0 else F // 2
    STEP: tl.constexpr = S if X == 0 else K
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    batches = tl.num_programs(0).to(tl.int64) // S
    k_ptr += (token * S + s) * F if X == 0 else (token * K + s // (S // K)) * X
    k_shift_ptr += token * S + s
    s_k = scores(k_ptr, k_map_ptr + s * X * E, key_row * STEP, e, E, X, BX, PRECISION)
    k = features(s_k, k_shift_ptr, key_row * S, e, 0, E, X, dtype)
    v = load_tile(v_ptr + (token * K + s // (S // K)) * H, key_row * K, h, None, H)
    take = tl.load(take_ptr + at * C + j)
    dv = tl.zeros((PLACES, BH), tl.float32)
    dkvs_ptr += at * F * H
    part_size = tl.num_programs(0).to(tl.int64) * chunks * F * H
    dzs_ptr += at * F
    dk, dv, into = _through_state(k, v, dv, take, dkvs_ptr, part_size, dzs_ptr, e, h, e < E, H, PARTS, PRECISION)
    if X > 0:
        k2 = features(s_k, k_shift_ptr + batches * T * S, key_row * S, e, 1, E, X, dtype)
        dk2, dv, into2 = _through_state(
            k2, v, dv, take, dkvs_ptr, part_size, dzs_ptr, E + e, h, e < E, H, PARTS, PRECISION
        )
        into += into2
    tl.store(dc_ptr + at * C + j, into)
    dg = tl.sum(tl.where(j[None, :] < place[:, None], into[None, :], 0.0), 1)
    tl.store(dg_ptr + ((block * tl.num_programs(0) + head) * chunks + n) * C + place, dg)

    decays = pairs_t(hi_ptr, lo_ptr, M_ptr, start_ptr, at * C, j, C)
    for r in tl.range(0, N // S, disable_licm=True):
        first_row = token * N + s * (N // S) + r
        row = tl.minimum(place, last) * N
        a = tl.load(a_ptr + first_row + row, mask=rows_in, other=0.0)
        b = tl.load(b_ptr + first_row + row, mask=rows_in, other=0.0)
        q_map = q_map_ptr + (s * (N // S) + r) * X * E
        s_q = scores(q_ptr + first_row * (F if X == 0 else X), q_map, row, e, E, X, BX, PRECISION)
        q = features(s_q, q_shift_ptr + first_row, row, e, 0, E, X, dtype)
        dy = load_tile(dy_ptr + first_row * H, row, h, None, H)
        kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if X > 0:
            q2 = features(s_q, q_shift_ptr + batches * T * N + first_row, row, e, 1, E, X, dtype)
            kq = tl.dot(k2, tl.trans(q2), kq, input_precision=PRECISION)
        weights = kq * decays * a[None, :]
        dv = tl.dot(weights.to(dtype), dy, dv, input_precision=PRECISION)
        on_values = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        dscores = (decays * (a[None, :] * on_values + b[None, :])).to(dtype)
        dk = tl.dot(dscores, q, dk, input_precision=PRECISION)
        if X > 0:
            dk2 = tl.dot(dscores, q2, dk2, input_precision=PRECISION)
    if X > 0:
        dk = to_scores(k, dk, 0, SOFTMAX) + to_scores(k2, dk2, 1, SOFTMAX)
    store_tile(dk_ptr + (token * S + s) * E, j * S, e, keys_in, dk, E)
    store_tile(dv_ptr + (token * S + s) * H, j * S, h, keys_in, dv, H)
