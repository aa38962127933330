"""Triton: outputs, log normalizers and states.

Programs that read queries take rows of several query heads at once: row ``x`` of a tile is place ``x % C`` of the chunk
in query head ``x // C`` of the block. All of them share the keys, values and state that the tile meets.

Sums that feed a denominator are not rounded: ``z`` and the keys' weights enter matrix units as ``in_columns``.
"""

# Triton compiles these functions from their source; what it accepts is not what its annotations say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from pallas_kernels.log_gate_attention.triton.decay import EMPTY, pairs, unscale
from pallas_kernels.log_gate_attention.triton.features import features, features_t, scores, scores_t
from pallas_kernels.log_gate_attention.triton.tiles import in_columns, in_two, load_tile, load_tile_t, store_tile

SMALLEST = tl.constexpr(1e-30)


@triton.jit
def block_of_features(block, F: tl.constexpr, BF: tl.constexpr, X: tl.constexpr):
    """Of one of the blocks of ``BF`` features: its half, places in the half and in the state, and which exist."""
    E: tl.constexpr = F if X == 0 else F // 2
    parts: tl.constexpr = (E + BF - 1) // BF
    half = block // parts
    e = (block % parts) * BF + tl.arange(0, BF)
    return half, e, half * E + e, e < E


@triton.jit
def states_kernel(
    k_ptr, k_map_ptr, k_shift_ptr, v_ptr, kv_ptr, z_ptr, take_ptr, keep_ptr,
    kvs_ptr, zs_ptr, kv_out_ptr, z_out_ptr, T, chunks,
    S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr, X: tl.constexpr, BX: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk and after the last: a program per head and ``[BF, BH]`` block, from chunk to chunk.

    Gradients want ``kvs[PARTS, B, S, chunks, F, H]`` in two parts, as matmuls read them; then what the state takes has
    two, too. ``zs[B, S, chunks, F]`` is fp32.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    half, e, f, inside = block_of_features(tl.program_id(1), F, BF, X)
    h = tl.program_id(2) * BH + tl.arange(0, BH)
    place = tl.arange(0, C)
    E: tl.constexpr = F if X == 0 else F // 2
    STEP: tl.constexpr = S if X == 0 else K
    batches = tl.num_programs(0).to(tl.int64) // S
    first = tl.program_id(2) == 0
    kv = load_tile(kv_ptr + head * F * H, f, h, inside, H)
    z = tl.load(z_ptr + head * F + f, mask=inside, other=0.0)
    for n in tl.range(0, chunks, disable_licm=True):
        at = head * chunks + n
        if PARTS > 1:
            high, rest = in_two(kv, kvs_ptr.dtype.element_ty)
            store_tile(kvs_ptr + at * F * H, f, h, inside, high, H)
            store_tile(kvs_ptr + (tl.num_programs(0) * chunks + at) * F * H, f, h, inside, rest, H)
        else:
            store_tile(kvs_ptr + at * F * H, f, h, inside, kv, H)
        if first:
            tl.store(zs_ptr + at * F + f, z, mask=inside)
        token, row = batch * T + n * C, tl.minimum(place, T - 1 - n * C)
        rows = k_ptr + (token * S + s) * F if X == 0 else k_ptr + (token * K + s // (S // K)) * X
        key = scores_t(rows, k_map_ptr + s * X * E, row * STEP, e, E, X, BX, PRECISION)
        shift = k_shift_ptr + half * batches * T * S + token * S + s
        key = features_t(key, shift, row * S, e, half, E, X, v_ptr.dtype.element_ty)
        v = load_tile(v_ptr + (token * K + s // (S // K)) * H, row * K, h, None, H)
        take, keep = tl.load(take_ptr + at * C + place), tl.load(keep_ptr + at)
        taken = v.to(tl.float32) * take[:, None]
        if PARTS > 1:
            taken, left = in_two(taken, v.dtype)
            kv = tl.dot(key, taken, keep * kv, input_precision=PRECISION)
            kv = tl.dot(key, left, kv, input_precision=PRECISION)
        else:
            kv = tl.dot(key, taken.to(v.dtype), keep * kv, input_precision=PRECISION)
        z = keep * z + tl.sum(tl.dot(key, in_columns(take, key.dtype), input_precision=PRECISION), 1)
    store_tile(kv_out_ptr + head * F * H, f, h, inside, kv, H)
    if first:
        tl.store(z_out_ptr + head * F + f, z, mask=inside)


@triton.jit
def write_outputs(
    y_ptr, n_ptr, row, kept, h, num, den, own, first, H: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    nonempty = den > SMALLEST
    safe = tl.where(nonempty, den, 1.0)
    if NORMALIZE:
        y = num * tl.where(nonempty, 1.0 / safe, 0.0)[:, None]
    else:
        half = unscale(own)[:, None]
        y = num * half * half
    store_tile(y_ptr, row, h, kept, y, H)
    if first:
        tl.store(n_ptr + row, tl.where(nonempty, own + tl.log(safe), EMPTY), mask=kept)


@triton.jit
def outputs_kernel(
    q_ptr, q_map_ptr, q_shift_ptr, k_ptr, k_map_ptr, k_shift_ptr, v_ptr,
    hi_ptr, lo_ptr, M_ptr, own_ptr, start_ptr, reads_ptr, kvs_ptr, zs_ptr, y_ptr, n_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    X: tl.constexpr, BX: tl.constexpr,
    C: tl.constexpr, HEADS: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr,
    NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk from the state before it: a program per head, chunk, ``HEADS`` query heads and ``BH``."""
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    n = tl.program_id(1)
    parts: tl.constexpr = (H + BH - 1) // BH
    block, column = tl.program_id(2) // parts, tl.program_id(2) % parts
    h = column * BH + tl.arange(0, BH)
    place = tl.arange(0, C)
    x = tl.arange(0, HEADS * C)
    i, r = x % C, block * HEADS + x // C
    rows_in, last = (n * C + i < T) & (r < N // S), T - 1 - n * C
    token = batch * T + n * C
    first_row = token * N + s * (N // S)
    row, key_row = tl.minimum(i, last) * N + tl.minimum(r, N // S - 1), tl.minimum(place, last)
    at = head * chunks + n

    w = tl.zeros((HEADS * C, C), tl.float32)
    num = tl.zeros((HEADS * C, BH), tl.float32)
    reads_z = tl.zeros((HEADS * C, 16), tl.float32)
    E: tl.constexpr = F if X == 0 else F // 2
    STEP: tl.constexpr = S if X == 0 else K
    q_ptr += first_row * (F if X == 0 else X)
    k_ptr += (token * S + s) * F if X == 0 else (token * K + s // (S // K)) * X
    q_map_ptr += (s * (N // S) + block) * X * E
    batches = tl.num_programs(0).to(tl.int64) // S
    for start in range(0, E, BF):
        e = start + tl.arange(0, BF)
        s_q = scores(q_ptr, q_map_ptr, row, e, E, X, BX, PRECISION)
        s_k = scores_t(k_ptr, k_map_ptr + s * X * E, key_row * STEP, e, E, X, BX, PRECISION)
        for half in tl.range(0, 1 if X == 0 else 2, disable_licm=True):
            f = half * E + e
            shift = q_shift_ptr + half * batches * T * N + first_row
            q = features(s_q, shift, row, e, half, E, X, v_ptr.dtype.element_ty)
            shift = k_shift_ptr + half * batches * T * S + token * S + s
            key = features_t(s_k, shift, key_row * S, e, half, E, X, v_ptr.dtype.element_ty)
            kv = load_tile(kvs_ptr + at * F * H, f, h, e < E, H)
            z = tl.load(zs_ptr + at * F + f, mask=e < E, other=0.0)
            w = tl.dot(q, key, w, input_precision=PRECISION)
            num = tl.dot(q, kv, num, input_precision=PRECISION)
            reads_z = tl.dot(q, in_columns(z, q.dtype), reads_z, input_precision=PRECISION)

    w *= pairs(hi_ptr, lo_ptr, M_ptr, start_ptr, at * C, i, C)
    reads = tl.load(reads_ptr + at * C + i)
    den = tl.sum(w, 1) + reads * tl.sum(reads_z, 1)
    v = load_tile(v_ptr + (token * K + s // (S // K)) * H, key_row * K, h, None, H)
    num = tl.dot(w.to(v.dtype), v, num * reads[:, None], input_precision=PRECISION)
    own = tl.load(own_ptr + at * C + i)
    write_outputs(y_ptr + first_row * H, n_ptr + first_row, row, rows_in, h, num, den, own, column == 0, H, NORMALIZE)


@triton.jit
def fused_kernel(
    q_ptr, k_ptr, v_ptr, kv_ptr, z_ptr, hi_ptr, lo_ptr, M_ptr, own_ptr, start_ptr, reads_ptr, take_ptr, keep_ptr,
    y_ptr, n_ptr, kv_out_ptr, z_out_ptr, T, chunks,
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
    inside = None if BF == F else f < F
    kv = load_tile(kv_ptr + head * F * H, f, h, inside, H)
    z = tl.load(z_ptr + head * F + f, mask=f < F, other=0.0)
    for n in tl.range(0, chunks, disable_licm=True):
        at = head * chunks + n
        token, last = batch * T + n * C, T - 1 - n * C
        key_row = tl.minimum(place, last)
        key = load_tile_t(k_ptr + (token * S + s) * F, key_row * S, f, None, F)
        v = load_tile(v_ptr + (token * K + s // (S // K)) * H, key_row * K, h, None, H)
        rounded = kv.to(v.dtype)
        sums = in_columns(z, v.dtype)
        decays = pairs(hi_ptr, lo_ptr, M_ptr, start_ptr, at * C, i, C)
        reads = tl.load(reads_ptr + at * C + i)
        own = tl.load(own_ptr + at * C + i)
        first_row = token * N + s * (N // S)
        for block in tl.range(0, N // S, HEADS, disable_licm=True):
            r = block + x // C
            row = tl.minimum(i, last) * N + tl.minimum(r, N // S - 1)
            q = load_tile(q_ptr + first_row * F, row, f, None, F)
            den = reads * tl.sum(tl.dot(q, sums, input_precision=PRECISION), 1)
            w = tl.dot(q, key, input_precision=PRECISION) * decays
            den += tl.sum(w, 1)
            w = w.to(v.dtype)
            num = reads[:, None] * tl.dot(q, rounded, input_precision=PRECISION)
            num = tl.dot(w, v, num, input_precision=PRECISION)
            rows_in = (i <= last) & (r < N // S)
            write_outputs(y_ptr + first_row * H, n_ptr + first_row, row, rows_in, h, num, den, own, first, H, NORMALIZE)
        take, keep = tl.load(take_ptr + at * C + place), tl.load(keep_ptr + at)
        taken = (v.to(tl.float32) * take[:, None]).to(v.dtype)
        kv = tl.dot(key, taken, keep * kv, input_precision=PRECISION)
        z = keep * z + tl.sum(tl.dot(key, in_columns(take, key.dtype), input_precision=PRECISION), 1)
    store_tile(kv_out_ptr + head * F * H, f, h, inside, kv, H)
    if first:
        tl.store(z_out_ptr + head * F + f, z, mask=f < F)
