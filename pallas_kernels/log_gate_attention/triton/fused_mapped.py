"""Triton: the forward pass from raw queries and keys, all at once: features and states stay in registers.

A tile holds a whole half of the features, so that what scales a token's features is found where they are made. For
``exp`` the keys' scales are part of their weights, and found before.
"""

# Triton compiles these functions from their source; what it accepts is not what its annotations say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from pallas_kernels.log_gate_attention.triton.decay import pairs
from pallas_kernels.log_gate_attention.triton.features import features_t, scores, scores_t
from pallas_kernels.log_gate_attention.triton.forward import write_outputs
from pallas_kernels.log_gate_attention.triton.tiles import in_columns, load_tile, store_tile


@triton.jit
def _softmax(s, inside, axis: tl.constexpr, dtype: tl.constexpr):
    """Over the scores at ``inside``; of these functions both halves are made one after the other from ``s`` and -s."""
    s = tl.where(inside, s, -1e30)
    weights = tl.exp(s - tl.expand_dims(tl.max(s, axis), axis))
    return (weights * tl.expand_dims(1.0 / tl.sum(weights, axis), axis)).to(dtype)


@triton.jit
def _exp(s, top, inside, dtype: tl.constexpr):
    return tl.where(inside, tl.exp(s - top[:, None]), 0.0).to(dtype)


@triton.jit
def fused_mapped_kernel(
    q_ptr, q_map_ptr, k_ptr, k_map_ptr, k_shift_ptr, v_ptr, kv_ptr, z_ptr,
    hi_ptr, lo_ptr, M_ptr, own_ptr, start_ptr, reads_ptr, take_ptr, keep_ptr,
    y_ptr, n_ptr, kv_out_ptr, z_out_ptr, T, chunks,
    N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, F: tl.constexpr, H: tl.constexpr,
    X: tl.constexpr, BX: tl.constexpr, SOFTMAX: tl.constexpr,
    C: tl.constexpr, BF: tl.constexpr, BH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program per head and ``BH`` columns carries its state from chunk to chunk, the halves of its features apart."""
    head = tl.program_id(1).to(tl.int64)
    batch, s = head // S, head % S
    h = tl.program_id(0) * BH + tl.arange(0, BH)
    first = tl.program_id(0) == 0
    e = tl.arange(0, BF)
    place = tl.arange(0, C)
    E: tl.constexpr = F // 2
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    batches = tl.num_programs(1).to(tl.int64) // S
    inside = e < E
    kv_1 = load_tile(kv_ptr + head * F * H, e, h, inside, H)
    kv_2 = load_tile(kv_ptr + head * F * H, E + e, h, inside, H)
    z_1 = tl.load(z_ptr + head * F + e, mask=inside, other=0.0)
    z_2 = tl.load(z_ptr + head * F + E + e, mask=inside, other=0.0)
    for n in tl.range(0, chunks, disable_licm=True):
        at = head * chunks + n
        token, last = batch * T + n * C, T - 1 - n * C
        row = tl.minimum(place, last)
        s_k = scores_t(k_ptr + (token * K + s // (S // K)) * X, k_map_ptr + s * X * E, row * K, e, E, X, BX, PRECISION)
        if SOFTMAX:
            k_1, k_2 = _softmax(s_k, inside[:, None], 0, dtype), _softmax(-s_k, inside[:, None], 0, dtype)
        else:
            shift = k_shift_ptr + token * S + s
            k_1 = features_t(s_k, shift, row * S, e, 0, E, X, dtype)
            k_2 = features_t(s_k, shift + batches * T * S, row * S, e, 1, E, X, dtype)
        v = load_tile(v_ptr + (token * K + s // (S // K)) * H, row * K, h, None, H)
        kv_1_read, kv_2_read = kv_1.to(dtype), kv_2.to(dtype)
        z_1_read, z_2_read = in_columns(z_1, dtype), in_columns(z_2, dtype)
        decays = pairs(hi_ptr, lo_ptr, M_ptr, start_ptr, at * C, place, C)
        reads = tl.load(reads_ptr + at * C + place)
        own = tl.load(own_ptr + at * C + place)
        for r in tl.range(0, N // S, disable_licm=True):
            first_row = token * N + s * (N // S) + r
            s_q = scores(q_ptr + first_row * X, q_map_ptr + (s * (N // S) + r) * X * E, row * N, e, E, X, BX, PRECISION)
            level = own
            if SOFTMAX:
                q_1, q_2 = _softmax(s_q, inside[None, :], 1, dtype), _softmax(-s_q, inside[None, :], 1, dtype)
            else:
                top = tl.max(tl.abs(s_q), 1)
                q_1, q_2 = _exp(s_q, top, inside[None, :], dtype), _exp(-s_q, top, inside[None, :], dtype)
                level += top
            den = tl.dot(q_1, z_1_read, input_precision=PRECISION)
            den = reads * tl.sum(tl.dot(q_2, z_2_read, den, input_precision=PRECISION), 1)
            w = tl.dot(q_1, k_1, input_precision=PRECISION)
            w = tl.dot(q_2, k_2, w, input_precision=PRECISION) * decays
            den += tl.sum(w, 1)
            w = w.to(dtype)
            num = tl.dot(q_1, kv_1_read, input_precision=PRECISION)
            num = reads[:, None] * tl.dot(q_2, kv_2_read, num, input_precision=PRECISION)
            num = tl.dot(w, v, num, input_precision=PRECISION)
            write_outputs(
                y_ptr + first_row * H, n_ptr + first_row, row * N, place <= last, h, num, den, level, first, H, True
            )
        take, keep = tl.load(take_ptr + at * C + place), tl.load(keep_ptr + at)
        taken = (v.to(tl.float32) * take[:, None]).to(dtype)
        takes = in_columns(take, dtype)
        kv_1 = tl.dot(k_1, taken, keep * kv_1, input_precision=PRECISION)
        kv_2 = tl.dot(k_2, taken, keep * kv_2, input_precision=PRECISION)
        z_1 = keep * z_1 + tl.sum(tl.dot(k_1, takes, input_precision=PRECISION), 1)
        z_2 = keep * z_2 + tl.sum(tl.dot(k_2, takes, input_precision=PRECISION), 1)
    store_tile(kv_out_ptr + head * F * H, e, h, inside, kv_1, H)
    store_tile(kv_out_ptr + head * F * H, E + e, h, inside, kv_2, H)
    if first:
        tl.store(z_out_ptr + head * F + e, z_1, mask=inside)
        tl.store(z_out_ptr + head * F + E + e, z_2, mask=inside)
