"""Triton: decays of the whole sequence, found once by a kernel of their own; the other kernels only load them.

Per batch, state head and token, in arrays ``[B, S, L]`` of ``L = chunks · C`` places (``exponents`` says why exponents
are split in two):

- ``hi``, ``lo``: coarse part and rest of a key's log weight before the chunk's gates, the rest in units of ln 2;
  ``hi`` of an absent one is -1e30;
- ``M``: a row's scale on that same footing, about the largest ``hi`` in sight; 1e30 for none. ``own`` is the same
  number with the gates in it, which is what the log normalizer is relative to; -1e30 for none;
- ``start``: the first place of the chunk that the row sees, int32;
- ``reads``: what the row reads of the state before the chunk: ``e^(m - M)`` or 0;
- ``take``: what the state after the chunk takes of the key, and ``keep[B, S, chunks]``: what it keeps of the old state.

``m_last[B, S]`` is the scale of the state after the last chunk.
"""

# Triton compiles these functions from their source; what it accepts is not what its annotations say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from pallas_kernels import numerics

EMPTY = tl.constexpr(numerics.EMPTY)
ABSENT = tl.constexpr(numerics.ABSENT)
GRAIN = tl.constexpr(128.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _in_sight(x, start, y, next_start):
    """Largest value since the latest border, and where that is: of ``(value, its place if a border, else 0)``."""
    return tl.where(next_start > 0, y, tl.maximum(x, y)), tl.maximum(start, next_start)


@triton.jit
def _then(shift, floor, next_shift, next_floor):
    """Two maps ``m -> max(m + shift, floor)``, one after the other."""
    return shift + next_shift, tl.maximum(floor + next_shift, next_floor)


@triton.jit
def _weight(there, exponent):
    return tl.where(there, tl.exp(tl.where(there, exponent, 0.0)), 0.0)


@triton.jit
def decays_kernel(
    g_ptr, c_ptr, m_ptr,
    hi_ptr, lo_ptr, M_ptr, own_ptr, start_ptr, reads_ptr, take_ptr, keep_ptr, m_last_ptr, T, chunks,
    S: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program per batch and state head, ``CHUNKS`` chunks at a time."""
    head = tl.program_id(0).to(tl.int64)
    batch, s = head // S, head % S
    chunk = tl.arange(0, CHUNKS)
    place = tl.arange(0, C)
    m_tile = tl.load(m_ptr + head)
    for first in range(0, chunks, CHUNKS):
        n = first + chunk
        t = n[:, None] * C + place[None, :]
        at = (batch * T + t) * S + s
        g = tl.load(g_ptr + at, mask=t < T, other=0.0)
        c = tl.load(c_ptr + at, mask=t < T, other=EMPTY)

        forgets = g <= ABSENT
        gate = tl.where(forgets, 0.0, g)
        coarse = tl.floor(gate * GRAIN + 0.5) / GRAIN
        past, rest = tl.cumsum(coarse, 1), tl.cumsum(gate - coarse, 1)
        there = c > ABSENT
        key = tl.where(there, c, 0.0)
        key_coarse = tl.floor(key * GRAIN + 0.5) / GRAIN
        hi = tl.where(there, key_coarse - past, EMPTY)
        lo = (key - key_coarse) - rest
        # A border at the first place has no keys of the chunk before it: only the carried state is out of sight.
        top, start = tl.associative_scan((hi, tl.where(forgets, place[None, :], 0)), 1, _in_sight)
        opens = tl.sum(tl.where(place[None, :] == 0, forgets.to(tl.int32), 0), 1)

        # Scales of states, which may be off by rounding: weights are told their difference from the true ones.
        last = place[None, :] == C - 1
        total, total_rest = tl.sum(coarse, 1), tl.sum(gate - coarse, 1)
        top_last, start_last = tl.sum(tl.where(last, top, 0.0), 1), tl.sum(tl.where(last, start, 0), 1)
        cut = (opens + start_last) > 0
        floor = tl.where(top_last > ABSENT, top_last + total, EMPTY)
        shift, floor = tl.associative_scan((tl.where(cut, EMPTY, total), floor), 0, _then)
        m_next = tl.maximum(m_tile + shift, floor)
        m_next = tl.where(m_next > ABSENT, m_next, EMPTY)
        earlier = tl.sum(tl.where(chunk[None, :] + 1 == chunk[:, None], m_next[None, :], 0.0), 1)
        m = tl.where(chunk == 0, m_tile, earlier)
        m_tile = tl.sum(tl.where(chunk == CHUNKS - 1, m_next, 0.0), 0)

        carried = tl.where((opens[:, None] + start) > 0, EMPTY, m[:, None])
        M = tl.maximum(top, carried)
        own = tl.where(M > ABSENT, (M + past) + rest, EMPTY)
        reads = _weight(carried > ABSENT, carried - M)

        # M + total = sum + lost, exactly.
        carried_last = tl.where(cut, EMPTY, m)
        M_last = tl.maximum(top_last, carried_last)
        sum_last = M_last + total
        part = sum_last - M_last
        lost = (M_last - (sum_last - part)) + (total - part)
        factor = tl.where(M_last > ABSENT, (sum_last - m_next) + lost + total_rest, 0.0)
        taken = there & (place[None, :] >= start_last[:, None])
        take = _weight(taken, (hi - M_last[:, None]) + (lo + factor[:, None]))
        keep = _weight(carried_last > ABSENT, (carried_last - M_last) + factor)

        out = head * chunks * C + t
        written = (n < chunks)[:, None] & (place >= 0)[None, :]
        tl.store(hi_ptr + out, hi, mask=written)
        tl.store(lo_ptr + out, lo * LOG2E, mask=written)
        tl.store(M_ptr + out, tl.where(M > ABSENT, M, -EMPTY), mask=written)
        tl.store(own_ptr + out, own, mask=written)
        tl.store(start_ptr + out, start, mask=written)
        tl.store(reads_ptr + out, reads, mask=written)
        tl.store(take_ptr + out, take, mask=written)
        tl.store(keep_ptr + head * chunks + n, keep, mask=n < chunks)
    tl.store(m_last_ptr + head, m_tile)


@triton.jit
def pairs(hi_ptr, lo_ptr, M_ptr, start_ptr, at, i, C: tl.constexpr):
    """Decays of each key ``j`` to rows at places ``i`` of the chunk at ``at``: ``[rows, C]``, 0 where not seen."""
    j = tl.arange(0, C)
    M, start = tl.load(M_ptr + at + i)[:, None], tl.load(start_ptr + at + i)[:, None]
    hi, lo = tl.load(hi_ptr + at + j)[None, :], tl.load(lo_ptr + at + j)[None, :]
    return _of_pairs(hi, lo, M, i[:, None], j[None, :], start)


@triton.jit
def pairs_t(hi_ptr, lo_ptr, M_ptr, start_ptr, at, j, C: tl.constexpr):
    """The same, transposed: of keys at places ``j`` to each row: ``[keys, C]``."""
    i = tl.arange(0, C)
    M, start = tl.load(M_ptr + at + i)[None, :], tl.load(start_ptr + at + i)[None, :]
    hi, lo = tl.load(hi_ptr + at + j)[:, None], tl.load(lo_ptr + at + j)[:, None]
    return _of_pairs(hi, lo, M, i[None, :], j[:, None], start)


@triton.jit
def _of_pairs(hi, lo, M, i, j, start):
    # One comparison for start <= j <= i: an earlier key is a large unsigned number. A power of two is one instruction,
    # while one of e has to be prepared by others.
    seen = (j - start).to(tl.uint32) <= (i - start).to(tl.uint32)
    return tl.exp2(tl.where(seen, (hi - M) * LOG2E + lo, EMPTY))


@triton.jit
def unscale(own):
    """``e^(own/2)``, to be multiplied twice, so that only a result out of range overflows; 0 for empty memory."""
    return _weight(own > ABSENT, 0.5 * own)
