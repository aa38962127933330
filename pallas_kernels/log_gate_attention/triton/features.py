"""Triton: features, loaded from memory or computed where they are needed.

With a feature map (``X`` > 0, the width of raw queries and keys) the ``F = 2E`` features of a token are
``e^(s - shift₀) ⊕ e^(-s - shift₁)`` with ``E`` scores ``s = x·A``. The shifts, ``[2, B, T, heads]``, are found once:
the logarithms of both sums for ``softmax``, the largest ``|s|`` for ``exp``. Without a map (``X`` = 0) there is one
"half" of ``E = F`` features, and they are in memory.
"""

# Triton compiles these functions from their source; what it accepts is not what its annotations say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from pallas_kernels.log_gate_attention.triton.tiles import covered, load_tile, load_tile_t

BLOCK = tl.constexpr(64)  # of a map's rows in registers at once


@triton.jit
def shifts_kernel(
    x_ptr, map_ptr, shift_ptr, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, X: tl.constexpr, E: tl.constexpr, BX: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of ``ROWS`` tokens and one head, which reads raw head ``head // GROUP``."""
    first, head = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1)
    place = tl.arange(0, ROWS)
    e = tl.arange(0, BE)
    rows_in = first + place < tokens
    row = tl.minimum(place, tokens - 1 - first)
    raw: tl.constexpr = HEADS // GROUP
    s = scores(x_ptr + (first * raw + head // GROUP) * X, map_ptr + head * X * E, row * raw, e, E, X, BX, PRECISION)
    out = shift_ptr + (first + place) * HEADS + head
    inside = (e < E)[None, :]
    if SOFTMAX:
        for half in tl.static_range(2):
            signed = tl.where(inside, s if half == 0 else -s, -1e30)
            top = tl.max(signed, 1)
            total = top + tl.log(tl.sum(tl.exp(signed - top[:, None]), 1))
            tl.store(out + half * tokens * HEADS, total, mask=rows_in)
    else:
        top = tl.max(tl.where(inside, tl.abs(s), 0.0), 1)
        for half in tl.static_range(2):
            tl.store(out + half * tokens * HEADS, top, mask=rows_in)


@triton.jit
def scores(
    x_ptr, map_ptr, row, e, E: tl.constexpr, X: tl.constexpr, BX: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Before the exponential, ``[rows, e]``: scores in fp32, or the features themselves."""
    if X == 0:
        out = load_tile(x_ptr, row, e, None, E)
    else:
        out = tl.zeros((row.shape[0], e.shape[0]), tl.float32)
        for start in tl.range(0, BX, min(BX, BLOCK), disable_licm=True):
            column = start + tl.arange(0, min(BX, BLOCK))
            x = load_tile(x_ptr, row, column, None, X)
            rows_in = None if BX == X else column < X
            out = tl.dot(x, load_tile(map_ptr, column, e, rows_in, E), out, input_precision=PRECISION)
    return out


@triton.jit
def scores_t(
    x_ptr, map_ptr, row, e, E: tl.constexpr, X: tl.constexpr, BX: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The same, transposed: ``[e, rows]``."""
    if X == 0:
        out = load_tile_t(x_ptr, row, e, None, E)
    else:
        out = tl.zeros((e.shape[0], row.shape[0]), tl.float32)
        for start in tl.range(0, BX, min(BX, BLOCK), disable_licm=True):
            column = start + tl.arange(0, min(BX, BLOCK))
            x = load_tile_t(x_ptr, row, column, None, X)
            rows_in = None if BX == X else column < X
            out = tl.dot(load_tile_t(map_ptr, column, e, rows_in, E), x, out, input_precision=PRECISION)
    return out


@triton.jit
def features(s, shift_ptr, row, e, half, E: tl.constexpr, X: tl.constexpr, dtype: tl.constexpr):
    """One half of the features, ``[rows, e]``, in the type that matmuls read."""
    if X == 0:
        out = s
    else:
        out = tl.exp(tl.where(half == 0, s, -s) - tl.load(shift_ptr + row)[:, None])
        if not covered(E, e.shape[0]):
            out = tl.where((e < E)[None, :], out, 0.0)
        out = out.to(dtype)
    return out


@triton.jit
def features_t(s, shift_ptr, row, e, half, E: tl.constexpr, X: tl.constexpr, dtype: tl.constexpr):
    """The same, transposed: ``[e, rows]``."""
    if X == 0:
        out = s
    else:
        out = tl.exp(tl.where(half == 0, s, -s) - tl.load(shift_ptr + row)[None, :])
        if not covered(E, e.shape[0]):
            out = tl.where((e < E)[:, None], out, 0.0)
        out = out.to(dtype)
    return out


@triton.jit
def to_scores(phi, dphi, half, SOFTMAX: tl.constexpr):
    """What one half's cotangent adds to the scores'. For ``exp`` the shift is a constant."""
    out = phi.to(tl.float32) * dphi
    if SOFTMAX:
        out -= phi.to(tl.float32) * tl.sum(out, 1)[:, None]
    return tl.where(half == 0, out, -out)
