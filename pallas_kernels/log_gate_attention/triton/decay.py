"""Triton: decays of a chunk. One kernel finds every exponent of the sequence; the others turn them into weights.

Per state head and token, in arrays ``[B, S, L]`` of ``L = chunks · C`` places (``exponents`` says why they are exact):

- ``past``, ``rest``: sums of the coarse parts, and of the rests, of the chunk's gates up to here;
- ``borders``: how many of them forget everything, int32;
- ``hi``, ``lo``: coarse part and rest of the key's log weight before those sums; ``hi`` is -1e30 for an absent key;
- ``top``: the largest ``hi`` in sight, -1e30 for none.

``scale[B, S, chunks + 1]`` are the states' scales ``m``, the last one the final state's.
"""

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1e30)
ABSENT = tl.constexpr(-1e29)
GRAIN = tl.constexpr(128.0)
SMALLEST = tl.constexpr(1e-30)


@triton.jit
def _larger_in_sight(x, x_border, y, y_border):
    return tl.where(y_border > 0, y, tl.maximum(x, y)), tl.maximum(x_border, y_border)


@triton.jit
def _then(shift, floor, next_shift, next_floor):
    """Two maps ``m -> max(m + shift, floor)``, one after the other."""
    return shift + next_shift, tl.maximum(floor + next_shift, next_floor)


@triton.jit
def exponents_kernel(
    g_ptr, c_ptr, m_ptr, past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr, T, chunks,
    S: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program per batch and state head, ``CHUNKS`` chunks at a time."""
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    chunk = tl.arange(0, CHUNKS)
    place = tl.arange(0, C)
    m = tl.load(m_ptr + head)
    tl.store(scale_ptr + head * (chunks + 1), m)
    for first in range(0, chunks, CHUNKS):
        n = first + chunk
        t = n[:, None] * C + place[None, :]
        at = (batch * T + t) * S + s
        g = tl.load(g_ptr + at, mask=t < T, other=0.0)
        c = tl.load(c_ptr + at, mask=t < T, other=EMPTY)

        border = (g <= ABSENT).to(tl.int32)
        gate = tl.where(g <= ABSENT, 0.0, g)
        coarse = tl.floor(gate * GRAIN + 0.5) / GRAIN
        past, rest = tl.cumsum(coarse, 1), tl.cumsum(gate - coarse, 1)
        there = c > ABSENT
        key = tl.where(there, c, 0.0)
        key_coarse = tl.floor(key * GRAIN + 0.5) / GRAIN
        hi = tl.where(there, key_coarse - past, EMPTY)
        lo = (key - key_coarse) - rest
        borders = tl.cumsum(border, 1)
        top, _ = tl.associative_scan((hi, border), 1, _larger_in_sight)

        out = head * chunks * C + t
        written = (n < chunks)[:, None] & (place >= 0)[None, :]
        tl.store(past_ptr + out, past, mask=written)
        tl.store(rest_ptr + out, rest, mask=written)
        tl.store(borders_ptr + out, borders, mask=written)
        tl.store(hi_ptr + out, hi, mask=written)
        tl.store(lo_ptr + out, lo, mask=written)
        tl.store(top_ptr + out, top, mask=written)

        # A scale may be off by rounding: what it weighs is told its difference from the true one.
        total, crossed = tl.sum(coarse, 1), tl.sum(border, 1)
        highest = tl.max(tl.where(borders == crossed[:, None], hi, EMPTY), 1)
        shift = tl.where(crossed > 0, EMPTY, total)
        floor = tl.where(highest > ABSENT, highest + total, EMPTY)
        shift, floor = tl.associative_scan((shift, floor), 0, _then)
        scale = tl.maximum(m + shift, floor)
        scale = tl.where(scale > ABSENT, scale, EMPTY)
        tl.store(scale_ptr + head * (chunks + 1) + n + 1, scale, mask=n < chunks)
        m = tl.sum(tl.where(chunk == CHUNKS - 1, scale, 0.0), 0)


@triton.jit
def row_scale(top_ptr, borders_ptr, at, m):
    """Of rows at places ``at``, after a state of scale ``m``: borders before them and their own scale, -1e30 for none."""
    borders = tl.load(borders_ptr + at)
    top = tl.load(top_ptr + at)
    return borders, tl.maximum(top, tl.where(borders == 0, m, EMPTY))


@triton.jit
def carried(borders, M, m):
    """How much of the carried state a row reads: ``e^(m - M)`` where it is in sight."""
    seen = tl.where(borders == 0, m, EMPTY) > ABSENT
    return tl.where(seen, tl.exp(tl.where(seen, m - M, 0.0)), 0.0)


@triton.jit
def pair(hi, lo, M, seen):
    """Decays ``e^((hi - M) + lo)`` of pairs that are ``seen``; a row's scale is -1e30 where all its keys are absent."""
    M = tl.where(M > ABSENT, M, 0.0)
    return tl.exp(tl.where(seen, (hi - M) + lo, EMPTY))


@triton.jit
def into_state(past_ptr, rest_ptr, borders_ptr, hi_ptr, lo_ptr, top_ptr, scale_ptr, start, C: tl.constexpr):
    """Weights with which the next state takes each key of the chunk at ``start``, and keeps the carried state.

    ``scale_ptr`` points to the carried state's scale, which the next one's follows.
    """
    m, m_next = tl.load(scale_ptr), tl.load(scale_ptr + 1)
    end = start + C - 1
    borders, M = row_scale(top_ptr, borders_ptr, end, m)
    past, rest = tl.load(past_ptr + end), tl.load(rest_ptr + end)

    # M + past = total + lost, exactly.
    total = M + past
    part = total - M
    lost = (M - (total - part)) + (past - part)
    factor = tl.where(M > ABSENT, (total - m_next) + lost + rest, 0.0)

    at = start + tl.arange(0, C)
    hi, lo = tl.load(hi_ptr + at), tl.load(lo_ptr + at)
    take = pair(hi, lo + factor, M, tl.load(borders_ptr + at) == borders)
    kept = tl.where(borders == 0, m, EMPTY) > ABSENT
    keep = tl.where(kept, tl.exp(tl.where(kept, (m - M) + factor, 0.0)), 0.0)
    return take, keep


@triton.jit
def unscale(M, past, rest):
    """``e^(m/2)`` of a row, to be multiplied twice; 0 where ``M`` marks empty memory."""
    return tl.where(M > ABSENT, tl.exp(0.5 * tl.where(M > ABSENT, (M + past) + rest, 0.0)), 0.0)
