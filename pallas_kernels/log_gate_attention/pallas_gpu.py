"""Chunked attention as Pallas kernels for GPUs, compiled by Triton; nothing but JAX is needed.

Of Pallas' two GPU backends this is the Triton one, for it alone covers Ampere as well as Hopper (Mosaic GPU's matmuls
are Hopper's and Blackwell's), multiplies fp32 as fp32 and runs in the plain interpreter. JAX 0.11 warns that it is to
go, which is why JAX below 0.12 is pinned.

Six kernels. ``C`` is the length of a chunk, ``R = N/S`` the query heads of a state head, and a state is cut over ``H``
where it does not fit the registers of one block.

- forward: one program per sequence, state head and cut of ``H``; the state stays in registers from chunk to chunk.
- states, the backward pass' first: the same without reading; leaves the state at each chunk's start.
- queries: cotangents of a chunk's queries, and ``a`` and ``b`` of its rows (a pair's weight has the cotangent
  ``a_i (dy_i·v_j) + b_i``). Chunks are independent, here and in the last two kernels.
- state cotangents: from the last chunk to the first; leaves the cotangent of the state at each chunk's end.
- keys and values: cotangents of a chunk's keys; and of its values, gates and key scales.

Cotangents of gates and scales are sums of what nearly cancels: states and their cotangents stay fp32, and where bf16
would round them they enter matmuls with what rounding takes. A feature axis comes in ``parts``: the two halves of a
feature map, or pieces of at most 64 features. Axes that are not powers of two are padded with zeros, outside of the
kernels; a tail of ``T`` is masked inside.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import target
from pallas_kernels.log_gate_attention.exponents import GRAIN
from pallas_kernels.log_gate_attention.problem import Act, Implementation, Problem
from pallas_kernels.log_gate_attention.state import ABSENT, EMPTY, SMALLEST, LinearState

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

WIDEST = 256  # features, values or raw values of a head
# Matmuls that feed each other get one layout from Triton: where results are wider than high, it splits their columns
# over the warps, and otherwise their rows, of which a chunk has few. So the last of each chain is wide, by these sizes.
CHUNK, MAPPED_CHUNK = 32, 16  # tokens
BLOCK = 32  # values of a head, in the kernels that carry a state
PIECE = 64  # features that one matmul takes, where they are given
SUM_PIECE, STATE_PIECE = 16, 16  # raw features of a map's cotangent, and values of a state, that one matmul takes
WARPS = 8
RUN = 8  # chunks whose cotangents of a feature map are summed in registers


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A problem as the kernels see it: padded sizes, and how they are cut.

    Attributes:
        half: features of a half of the map before padding; 0 where features are given.
    """

    B: int
    T: int
    N: int
    S: int
    K: int
    H: int
    C: int
    parts: int
    width: int
    half: int
    X: int
    act: Act | None
    normalize: bool
    dtype: Any
    interpret: bool

    @property
    def count(self) -> int:
        return -(-self.T // self.C)

    @property
    def block(self) -> int:
        """Values of a head that one program of the first three kernels does."""
        return min(self.H, BLOCK)

    @property
    def run(self) -> int:
        return 1 if self.act is None else min(RUN, self.count)

    @property
    def raw_piece(self) -> int:
        """Raw values that one matmul takes; found by compiling without spills."""
        return 64 if self.width > 64 else 32

    @property
    def cuts(self) -> int:
        """Programs that share the cotangents of a map between them; together their registers hold the sums."""
        return 4 if self.width > 64 and self.X >= 64 else 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of the feature axis of a state."""
        return self.parts, self.width


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _pad(x: Array, **sizes: int) -> Array:
    """Zeros appended to axes, named ``a0``, ``a1``, …, up to a size."""
    widths = [(0, sizes.get(f"a{axis}", length) - length) for axis, length in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


# --- inside the kernels: one chunk ------------------------------------------------------------------------------------


def _dot(a: Float[Array, "m k"], b: Float[Array, "k n"], axes: tuple[int, int] = (1, 0)) -> Float[Array, "m n"]:
    """Product in fp32 over an axis of each; fp32 operands are multiplied as such."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _rounded(x: Array, dtype: Any) -> tuple[Array, ...]:
    """An fp32 operand in a matmul's dtype: rounded, and what rounding took, if anything."""
    rounded = x.astype(dtype)
    if rounded.dtype == x.dtype:
        return (x,)
    return rounded, (x - rounded.astype(x.dtype)).astype(dtype)


def _dot_wide(a: Float[Array, "m k"], b: Float[Array, "k n"], axes: tuple[int, int] = (1, 0)) -> Float[Array, "m n"]:
    """``_dot`` with an fp32 second operand that is not rounded."""
    return _sum(_dot(a, part, axes) for part in _rounded(b, a.dtype))


def _sum(terms) -> Array:
    return functools.reduce(jnp.add, terms)


def _places(C: int) -> Int[Array, " C"]:
    return lax.iota(jnp.int32, C)


class _Chunk:
    """Rows of chunk ``i`` of sequence ``b``: loads are 0 and stores go nowhere beyond ``T``."""

    def __init__(self, plan: _Plan, b, i):
        self.plan, self.b, self.start = plan, b, i * plan.C
        self.whole = plan.T % plan.C == 0

    def _view(self, ref, index):
        view = ref.at[(self.b, pl.ds(self.start, self.plan.C), *index)]
        inside = self.start + _places(self.plan.C) < self.plan.T
        return view, inside if len(view.shape) == 1 else inside[:, None]

    def load(self, ref, *index, other: float = 0.0) -> Array:
        view, inside = self._view(ref, index)
        return plgpu.load(view) if self.whole else plgpu.load(view, mask=inside, other=other)

    def store(self, ref, value: Array, *index) -> None:
        view, inside = self._view(ref, index)
        plgpu.store(view, value.astype(ref.dtype), mask=None if self.whole else inside)


class _Loads:
    """Parts of given features, each loaded where it is used: operands of matmuls that wait take up the registers."""

    def __init__(self, chunk: _Chunk, ref, head):
        self.chunk, self.ref, self.head = chunk, ref, head

    def __iter__(self) -> Iterator[Array]:
        return (self[p] for p in range(self.chunk.plan.parts))

    def __getitem__(self, p: int) -> Array:
        width = self.chunk.plan.width
        return self.chunk.load(self.ref, self.head, pl.ds(p * width, width))


def _on_state(chunk: _Chunk, ref, head, state_ref, index: tuple) -> Float[Array, "C width"]:
    """Rows of values, or of their cotangents, times a part of a transposed state, or of its cotangent."""
    pieces = _pieces(0, chunk.plan.H, STATE_PIECE)
    return _sum(_dot_wide(chunk.load(ref, head, piece), state_ref[(*index, piece)]) for piece in pieces)


class _Features(NamedTuple):
    """Of one head in one chunk; of a feature map also the log scale, and what is needed on the way back."""

    parts: _Loads | tuple[Float[Array, "C width"], ...]
    scale: Float[Array, " C"] | None = None
    exact: tuple[Float[Array, "C width"], ...] = ()


def _pieces(start, length: int, size: int) -> list[Any]:
    """Slices of an axis, so that no matmul takes more of it at once."""
    size = min(length, size)
    return [pl.ds(start + at, size) for at in range(0, length, size)]


def _features(chunk: _Chunk, ref, maps, head, raw_head) -> _Features:
    """Given features, or ``act(xA) ⊕ act(−xA)`` of raw ones with their log scale."""
    plan = chunk.plan
    if plan.act is None:
        return _Features(_Loads(chunk, ref, head))
    scores = _sum(
        _dot(chunk.load(ref, raw_head, piece), maps[head, piece]) for piece in _pieces(0, plan.X, plan.raw_piece)
    )
    real = (_places(plan.width) < plan.half)[None, :]
    if plan.act == "exp":
        scale = jnp.max(jnp.abs(scores), 1)
        exact = tuple(jnp.where(real, jnp.exp(sign * scores - scale[:, None]), 0.0) for sign in (1.0, -1.0))
    else:
        scale = None
        exact = tuple(_softmax(sign * scores, real) for sign in (1.0, -1.0))
    return _Features(tuple(part.astype(plan.dtype) for part in exact), scale, exact)


def _softmax(scores: Float[Array, "C width"], real: Bool[Array, "1 width"]) -> Float[Array, "C width"]:
    raised = jnp.exp(scores - jnp.max(jnp.where(real, scores, EMPTY), 1)[:, None])
    raised = jnp.where(real, raised, 0.0)
    return raised / jnp.sum(raised, 1)[:, None]


def _through_map(chunk: _Chunk, features: _Features, cotangents, ref, maps, head, raw_head, out, cut, dmap):
    """From cotangents of features to those of raw values, which are stored, and of the map, which join ``dmap``."""
    plan, on_scores = chunk.plan, []
    for exact, cotangent in zip(features.exact, cotangents, strict=True):
        product = exact * cotangent
        on_scores.append(product if plan.act == "exp" else product - exact * jnp.sum(product, 1)[:, None])
    dscores = (on_scores[0] - on_scores[1]).astype(plan.dtype)
    sums = []
    for piece, sum_before in zip(_pieces(cut, plan.X // plan.cuts, SUM_PIECE), dmap, strict=True):
        chunk.store(out, _dot(dscores, maps[head, piece], (1, 1)), head, piece)
        sums.append(sum_before + _dot(chunk.load(ref, raw_head, piece), dscores, (0, 0)))
    return tuple(sums)


def _sum_maps(plan: _Plan, body: Callable, out, b, head) -> None:
    """Run ``body(i, cut, dmap) -> dmap`` over the chunks of a run for one cut of the raw axis, and store the sum."""
    run, size = pl.program_id(2) // plan.cuts, plan.X // plan.cuts
    cut = pl.program_id(2) % plan.cuts * size
    zeros = tuple(jnp.zeros((min(size, SUM_PIECE), plan.width), jnp.float32) for _ in _pieces(0, size, SUM_PIECE))
    first = run * plan.run
    dmap = lax.fori_loop(
        first, jnp.minimum(first + plan.run, plan.count), lambda i, dmap: body(i, cut, dmap), zeros
    )  # fmt: skip
    for piece, part in zip(_pieces(cut, size, SUM_PIECE), dmap, strict=True):
        out[b, run, head, piece] = part


class _Exponents(NamedTuple):
    """Per place of a chunk; see ``exponents.Exponents``. What Triton lowers has no rounding, hence not that code."""

    coarse: Float[Array, " C"]
    rest: Float[Array, " C"]
    borders: Int[Array, " C"]
    hi: Float[Array, " C"]
    lo: Float[Array, " C"]


def _split(x: Float[Array, " C"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    coarse = jnp.floor(x * GRAIN + 0.5) * (1 / GRAIN)
    return coarse, x - coarse


def _exponents(g: Float[Array, " C"], c: Float[Array, " C"]) -> _Exponents:
    forgets, absent = g <= ABSENT, c <= ABSENT
    gate, gate_rest = _split(jnp.where(forgets, 0.0, g))
    scale, scale_rest = _split(jnp.where(absent, 0.0, c))
    coarse, rest = lax.cumsum(gate), lax.cumsum(gate_rest)
    borders = lax.cumsum(forgets.astype(jnp.int32))
    return _Exponents(coarse, rest, borders, jnp.where(absent, EMPTY, scale - coarse), scale_rest - rest)


class _Decay(NamedTuple):
    """What rows read of a chunk's keys and of the state it starts from, both relative to the rows' scales."""

    pair: Float[Array, "C C"]
    carried: Float[Array, " C"]
    held: Bool[Array, " C"]
    m: Float[Array, " C"]


def _decay(e: _Exponents, m: Float[Array, ""]) -> _Decay:
    place = _places(e.hi.shape[0])
    there = (place[:, None] >= place[None, :]) & (e.borders[:, None] == e.borders[None, :])
    there &= (e.hi > ABSENT)[None, :]
    old = (e.borders == 0) & (m > ABSENT)
    M = jnp.maximum(jnp.max(jnp.where(there, e.hi[None, :], EMPTY), 1), jnp.where(old, m, EMPTY))
    exponent = (e.hi[None, :] - M[:, None]) + e.lo[None, :]
    pair = jnp.where(there, jnp.exp(jnp.where(there, exponent, 0.0)), 0.0)
    carried = jnp.where(old, jnp.exp(jnp.where(old, m - M, 0.0)), 0.0)
    held = M > ABSENT
    return _Decay(pair, carried, held, jnp.where(held, (M + e.coarse) + e.rest, EMPTY))


class _Next(NamedTuple):
    """What the next state takes of each key and keeps of the last state, and its scale."""

    take: Float[Array, " C"]
    keep: Float[Array, ""]
    m: Float[Array, ""]


def _next(e: _Exponents, gate: Float[Array, " C"], m: Float[Array, ""]) -> _Next:
    """The scale is rounded; what rounding took from it goes into the weights."""
    forgets = gate <= ABSENT
    coarse, rest = _split(jnp.where(forgets, 0.0, gate))
    past, past_rest, borders = jnp.sum(coarse), jnp.sum(rest), jnp.sum(forgets.astype(jnp.int32))
    there = (e.borders == borders) & (e.hi > ABSENT)
    old = (borders == 0) & (m > ABSENT)
    M = jnp.maximum(jnp.max(jnp.where(there, e.hi, EMPTY), 0), jnp.where(old, m, EMPTY))
    total = M + past
    lost = (M - (total - (total - M))) + (past - (total - M)) + past_rest
    take = jnp.where(there, jnp.exp(jnp.where(there, ((e.hi - M) + e.lo) + lost, 0.0)), 0.0)
    keep = jnp.where(old, jnp.exp(jnp.where(old, (m - M) + lost, 0.0)), 0.0)
    return _Next(take, keep, jnp.where(M > ABSENT, total, EMPTY))


def _unscale(x: Float[Array, "C H"], decay: _Decay) -> Float[Array, "C H"]:
    """``x · e^m`` in two halves, so that only a result out of range overflows; 0 where there is no memory."""
    half = jnp.where(decay.held, jnp.exp(0.5 * decay.m), 0.0)[:, None]
    return x * half * half


class _State(NamedTuple):
    """A cut of a state, in registers: parts of ``kv``, transposed, and of ``z``, and the scale."""

    kv: tuple[Float[Array, "block width"], ...]
    z: tuple[Float[Array, " width"], ...]
    m: Float[Array, ""]


def _load_parts(ref, plan: _Plan, *index) -> tuple[Array, ...]:
    return tuple(ref[(*index[:-1], p, *index[-1])] for p in range(plan.parts))


def _store_parts(ref, values, *index) -> None:
    for p, value in enumerate(values):
        ref[(*index[:-1], p, *index[-1])] = value.astype(ref.dtype)


def _load_state(kv_ref, z_ref, m_ref, plan: _Plan, columns, *index) -> _State:
    return _State(
        _load_parts(kv_ref, plan, *index, (columns, slice(None))),
        _load_parts(z_ref, plan, *index, (slice(None),)),
        m_ref[index],
    )


def _store_state(refs, state: _State, columns, *index) -> None:
    kv_ref, z_ref, m_ref = refs
    _store_parts(kv_ref, state.kv, *index, (columns, slice(None)))
    _store_parts(z_ref, state.z, *index, (slice(None),))
    m_ref[index] = state.m


def _advance(state: _State, k, v: Float[Array, "C block"], following: _Next) -> _State:
    """The state after the chunk."""
    kvs, zs = [], []
    for kv, z, part in zip(state.kv, state.z, k, strict=True):
        taken = following.take[:, None] * part.astype(jnp.float32)
        kvs.append(following.keep * kv + _dot_wide(v, taken, (0, 0)))
        zs.append(following.keep * z + jnp.sum(taken, 0))
    return _State(tuple(kvs), tuple(zs), following.m)


def _loop(count: int, body: Callable, carry: Any) -> Any:
    """``carry = body(i, carry)`` for each of ``range(count)``."""
    if count == 1:
        return body(0, carry)
    return lax.fori_loop(np.int32(0), np.int32(count), body, carry)


# --- the kernels ------------------------------------------------------------------------------------------------------


def _maps_first(refs, plan: _Plan):
    """``(maps of queries, of keys)`` where there are any, and the other references."""
    return ((None, None), refs) if plan.act is None else (refs[:2], refs[2:])


def _forward_kernel(q_ref, k_ref, v_ref, g_ref, c_ref, kv_ref, z_ref, m_ref, *refs, plan: _Plan):
    (q_maps, k_maps), refs = _maps_first(refs, plan)
    y_ref, n_ref, *out_refs = refs
    b, s, columns = pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * plan.block, plan.block)
    rows, values = plan.N // plan.S, s // (plan.S // plan.K)

    def body(i, state: _State) -> _State:
        chunk = _Chunk(plan, b, i)
        k = _features(chunk, k_ref, k_maps, s, values)
        g, c = chunk.load(g_ref, s), chunk.load(c_ref, s, other=EMPTY)
        if k.scale is not None:
            c = jnp.where(c > ABSENT, c + k.scale, EMPTY)
            chunk.store(out_refs[3], c, s)
        e = _exponents(g, c)
        decay = _decay(e, state.m)

        def read(r, carry):
            n = s * rows + r
            # Keys and values are loaded anew for each head: kept as matmul operands they take half of the registers.
            v = chunk.load(v_ref, values, columns)
            k = _features(chunk, k_ref, k_maps, s, values).parts
            q = _features(chunk, q_ref, q_maps, n, n)
            weights = _sum(_dot(a, b, (1, 1)) for a, b in zip(q.parts, k, strict=True)) * decay.pair
            on_z = _sum(jnp.sum(a.astype(jnp.float32) * z[None, :], 1) for a, z in zip(q.parts, state.z, strict=True))
            den = jnp.sum(weights, 1) + decay.carried * on_z
            held = den > SMALLEST
            safe = jnp.where(held, den, 1.0)
            normalizer = decay.m + jnp.log(safe)
            normalizer = normalizer if q.scale is None else normalizer + q.scale
            chunk.store(n_ref, jnp.where(held, normalizer, EMPTY), n)
            on_state = _sum(_dot(a, kv.astype(a.dtype), (1, 1)) for a, kv in zip(q.parts, state.kv, strict=True))
            num = decay.carried[:, None] * on_state + _dot(weights.astype(v.dtype), v)
            y = jnp.where(held[:, None], num / safe[:, None], 0.0) if plan.normalize else _unscale(num, decay)
            chunk.store(y_ref, y, n, columns)
            return carry

        _loop(rows, read, ())
        v = chunk.load(v_ref, values, columns)
        return _advance(state, k.parts, v, _next(e, g, state.m))

    state = _load_state(kv_ref, z_ref, m_ref, plan, columns, b, s)
    _store_state(out_refs[:3], _loop(plan.count, body, state), columns, b, s)


def _states_kernel(k_ref, v_ref, g_ref, c_ref, kv_ref, z_ref, m_ref, *refs, plan: _Plan):
    (_, k_maps), refs = _maps_first(refs, plan)
    b, s, columns = pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * plan.block, plan.block)
    values = s // (plan.S // plan.K)

    def body(i, state: _State) -> _State:
        _store_state(refs, state, columns, b, s, i)
        chunk = _Chunk(plan, b, i)
        k = _features(chunk, k_ref, k_maps, s, values)
        g = chunk.load(g_ref, s)
        e = _exponents(g, chunk.load(c_ref, s, other=EMPTY))
        return _advance(state, k.parts, chunk.load(v_ref, values, columns), _next(e, g, state.m))

    _loop(plan.count, body, _load_state(kv_ref, z_ref, m_ref, plan, columns, b, s))


def _state_cotangents_kernel(
    q_ref, dy_ref, a_ref, b_ref, g_ref, c_ref, m_ref, dkv_ref, dz_ref, *refs, plan: _Plan
):  # fmt: skip
    (q_maps, _), refs = _maps_first(refs, plan)
    dkv_ends, dz_ends, dkv_start, dz_start = refs
    b, s, columns = pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * plan.block, plan.block)
    rows = plan.N // plan.S

    def body(back, carry):
        i = plan.count - 1 - back
        _store_parts(dkv_ends, carry[0], b, s, i, (columns, slice(None)))
        _store_parts(dz_ends, carry[1], b, s, i, (slice(None),))
        chunk = _Chunk(plan, b, i)
        g, m = chunk.load(g_ref, s), m_ref[b, s, i]
        e = _exponents(g, chunk.load(c_ref, s, other=EMPTY))
        decay, keep = _decay(e, m), _next(e, g, m).keep

        def read(r, carry):
            n = s * rows + r
            q = _features(chunk, q_ref, q_maps, n, n).parts
            dy = chunk.load(dy_ref, n, columns)
            pulled = (decay.carried * chunk.load(a_ref, n))[:, None] * dy.astype(jnp.float32)
            on_z = (decay.carried * chunk.load(b_ref, n))[:, None]
            dkv, dz = carry
            dz = tuple(x + jnp.sum(a.astype(jnp.float32) * on_z, 0) for x, a in zip(dz, q, strict=True))
            for part in _rounded(pulled, dy.dtype):
                dkv = tuple(x + _dot(part, a, (0, 0)) for x, a in zip(dkv, q, strict=True))
            return dkv, dz

        return _loop(rows, read, jax.tree.map(lambda x: keep * x, carry))

    carry = (
        _load_parts(dkv_ref, plan, b, s, (columns, slice(None))),
        _load_parts(dz_ref, plan, b, s, (slice(None),)),
    )
    dkv, dz = _loop(plan.count, body, carry)
    _store_parts(dkv_start, dkv, b, s, (columns, slice(None)))
    _store_parts(dz_start, dz, b, s, (slice(None),))


def _queries_kernel(
    q_ref, k_ref, v_ref, dy_ref, dn_ref, g_ref, c_ref, kv_ref, z_ref, m_ref, *refs, plan: _Plan
):  # fmt: skip
    (q_maps, k_maps), refs = _maps_first(refs, plan)
    dq_ref, a_ref, b_ref, since_ref, *dmaps_ref = refs
    b, n = pl.program_id(0), pl.program_id(1)
    s = n // (plan.N // plan.S)
    values = s // (plan.S // plan.K)

    def body(i, cut=0, dmap=()):
        chunk = _Chunk(plan, b, i)
        k = _features(chunk, k_ref, k_maps, s, values).parts
        q = _features(chunk, q_ref, q_maps, n, n)
        e = _exponents(chunk.load(g_ref, s), chunk.load(c_ref, s, other=EMPTY))
        decay = _decay(e, m_ref[b, s, i])
        dy, dn = chunk.load(dy_ref, n, slice(None)), chunk.load(dn_ref, n)
        scores = _sum(_dot(x, y, (1, 1)) for x, y in zip(q.parts, k, strict=True)) * decay.pair
        on_values = _dot(dy, chunk.load(v_ref, values, slice(None)), (1, 1))
        den, y_dy, on_state = jnp.sum(scores, 1), jnp.sum(scores * on_values, 1), []
        for p, part in enumerate(q.parts):
            wide = part.astype(jnp.float32)
            on_state.append(_on_state(chunk, dy_ref, n, kv_ref, (b, s, i, p)))
            den += decay.carried * jnp.sum(wide * z_ref[b, s, i, p][None, :], 1)
            y_dy += decay.carried * jnp.sum(wide * on_state[p], 1)
        held = den > SMALLEST
        inverse = jnp.where(held, 1.0 / jnp.where(held, den, 1.0), 0.0)
        if plan.normalize:
            on_sum, on_weight = inverse, (dn - y_dy * inverse) * inverse
        else:
            half = jnp.where(decay.held, jnp.exp(0.5 * decay.m), 0.0)
            on_sum, on_weight = half * half, dn * inverse
        chunk.store(a_ref, on_sum, n)
        chunk.store(b_ref, on_weight, n)

        dscores = decay.pair * (on_sum[:, None] * on_values + on_weight[:, None])
        dscores = dscores.astype(plan.dtype)
        dq, since = [], jnp.zeros((plan.C,), jnp.float32)
        for p, part in enumerate(q.parts):
            on_part = on_sum[:, None] * on_state[p] + on_weight[:, None] * z_ref[b, s, i, p][None, :]
            on_part = decay.carried[:, None] * on_part
            since += jnp.sum(part.astype(jnp.float32) * on_part, 1)
            dq.append(_dot(dscores, k[p]) + on_part)
        chunk.store(since_ref, since, n)
        if plan.act is None:
            for p in range(plan.parts):
                chunk.store(dq_ref, dq[p], n, pl.ds(p * plan.width, plan.width))
            return ()
        return _through_map(chunk, q, dq, q_ref, q_maps, n, n, dq_ref, cut, dmap)

    if plan.act is None:
        body(pl.program_id(2))
    else:
        _sum_maps(plan, body, dmaps_ref[0], b, n)


def _keys_kernel(
    q_ref, k_ref, v_ref, dy_ref, a_ref, b_ref, g_ref, c_ref, m_ref, dkv_ref, dz_ref, *refs, plan: _Plan
):  # fmt: skip
    (q_maps, k_maps), refs = _maps_first(refs, plan)
    dk_ref, filled_ref, *dmaps_ref = refs
    b, s, which = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, values = plan.N // plan.S, s // (plan.S // plan.K)

    def body(i, parts: tuple[int, ...]):
        """Cotangents of some parts of a chunk's keys."""
        chunk = _Chunk(plan, b, i)
        g, c, m = chunk.load(g_ref, s), chunk.load(c_ref, s, other=EMPTY), m_ref[b, s, i]
        e = _exponents(g, c)
        pair = _decay(e, m).pair

        def read(r, dk):
            n = s * rows + r
            dy, on_sum = chunk.load(dy_ref, n, slice(None)), chunk.load(a_ref, n)[:, None]
            on_values = _dot(dy, chunk.load(v_ref, values, slice(None)), (1, 1))
            dscores = (pair * (on_sum * on_values + chunk.load(b_ref, n)[:, None])).astype(plan.dtype)
            q = _features(chunk, q_ref, q_maps, n, n).parts
            return tuple(part + _dot(dscores, q[p], (0, 0)) for part, p in zip(dk, parts, strict=True))

        dk = list(_loop(rows, read, tuple(jnp.zeros((plan.C, plan.width), jnp.float32) for _ in parts)))
        # The next state is filled too.
        take = _next(e, g, m).take[:, None]
        k = _features(chunk, k_ref, k_maps, s, values)
        filled = jnp.zeros((plan.C,), jnp.float32)
        for at, p in enumerate(parts):
            on_part = take * (_on_state(chunk, v_ref, values, dkv_ref, (b, s, i, p)) + dz_ref[b, s, i, p][None, :])
            filled += jnp.sum(k.parts[p].astype(jnp.float32) * on_part, 1)
            dk[at] += on_part
        return chunk, k, dk, filled

    if plan.act is None:
        total = jnp.zeros((plan.C,), jnp.float32)
        for p in range(plan.parts):
            chunk, _, (dk,), filled = body(which, (p,))
            chunk.store(dk_ref, dk, s, pl.ds(p * plan.width, plan.width))
            total += filled
        _Chunk(plan, b, which).store(filled_ref, total, s)
        return

    def mapped(i, cut, dmap):
        chunk, k, dk, filled = body(i, (0, 1))
        chunk.store(filled_ref, filled, s)
        return _through_map(chunk, k, dk, k_ref, k_maps, s, values, dk_ref, cut, dmap)

    _sum_maps(plan, mapped, dmaps_ref[0], b, s)


def _values_kernel(
    q_ref, k_ref, v_ref, dy_ref, a_ref, b_ref, g_ref, c_ref, m_ref, dkv_ref, filled_ref, since_ref, kept_ref, *refs,
    plan: _Plan,
):  # fmt: skip
    (q_maps, k_maps), (dv_ref, dg_ref, dc_ref) = _maps_first(refs, plan)
    b, s, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, values = plan.N // plan.S, s // (plan.S // plan.K)
    chunk = _Chunk(plan, b, i)
    g, m = chunk.load(g_ref, s), m_ref[b, s, i]
    e = _exponents(g, chunk.load(c_ref, s, other=EMPTY))
    pair = _decay(e, m).pair
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)

    def read(r, carry):
        dv, exponent = carry
        n = s * rows + r
        dy, on_sum = chunk.load(dy_ref, n, slice(None)), chunk.load(a_ref, n)[:, None]
        on_values = _dot(dy, chunk.load(v_ref, values, slice(None)), (1, 1))
        q = _features(chunk, q_ref, q_maps, n, n).parts
        k = _features(chunk, k_ref, k_maps, s, values).parts
        scores = _sum(_dot(x, y, (1, 1)) for x, y in zip(q, k, strict=True)) * pair
        exponent += scores * (on_sum * on_values + chunk.load(b_ref, n)[:, None])
        return dv + _dot((scores * on_sum).astype(plan.dtype), dy, (0, 0)), exponent

    dv, exponent = _loop(rows, read, (zeros((plan.C, plan.H)), zeros((plan.C, plan.C))))

    following = _next(e, g, m)
    place = _places(plan.C)
    last = place == plan.C - 1
    # The last row's exponents are also those of the next state.
    exponent += jnp.where(last[:, None], chunk.load(filled_ref, s)[None, :], 0.0)
    since = chunk.load(since_ref, s) + jnp.where(last, following.keep * kept_ref[b, s, i], 0.0)
    chunk.store(dc_ref, jnp.sum(exponent, 0), s)
    # A gate parts the keys before it from the rows after it: sums of pairs as they stand, not of their differences.
    before = (place[:, None] < place[None, :]).astype(jnp.float32)
    parted = jnp.where(place[:, None] >= place[None, :], _dot(exponent, before) + since[:, None], 0.0)
    chunk.store(dg_ref, jnp.sum(parted, 0), s)

    for p, part in enumerate(_features(chunk, k_ref, k_maps, s, values).parts):
        taken = following.take[:, None] * part.astype(jnp.float32)
        dv += _dot(taken.astype(plan.dtype), dkv_ref[b, s, i, p].astype(plan.dtype), (1, 1))
    chunk.store(dv_ref, dv, s, slice(None))


# --- around the kernels -----------------------------------------------------------------------------------------------


def _call(kernel: Callable, plan: _Plan, grid: tuple[int, ...], inputs, outputs, warps: int) -> Any:
    name = kernel.__name__.strip("_")

    # XLA finds a kernel by its function's name.
    def run(*refs):
        kernel(*refs, plan=plan)

    run.__name__ = run.__qualname__ = name
    call = pl.pallas_call(
        run, grid=grid, out_shape=outputs, interpret=plan.interpret, name=name,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return call(*inputs)


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _run_forward(plan: _Plan, q, k, v, g, c, state: LinearState, maps):
    """The op's results, and the key scales with those that the feature map adds."""
    B, T, N, S, H = plan.B, plan.T, plan.N, plan.S, plan.H
    outputs = (
        _array(B, T, N, H, dtype=v.dtype), _array(B, T, N),
        _array(B, S, plan.parts, H, plan.width), _array(B, S, *plan.shape), _array(B, S),
        *([_array(B, T, S)] if plan.act == "exp" else []),
    )  # fmt: skip
    inputs = (q, k, v, g, c, state.kv, state.z, state.m, *(x.astype(q.dtype) for x in maps))
    y, n, kv, z, m, *scales = _call(_forward_kernel, plan, (B, S, H // plan.block), inputs, outputs, WARPS)
    return (y, n, LinearState(kv, z, m)), scales[0] if scales else c


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q, k, v, g, c, state: LinearState, maps):
    return _run_forward(plan, q, k, v, g, c, state, maps)[0]


def _attend_fwd(plan: _Plan, q, k, v, g, c, state: LinearState, maps):
    out, c = _run_forward(plan, q, k, v, g, c, state, maps)
    return out, (q, k, v, g, c, state, maps)


def _attend_bwd(plan: _Plan, saved, cotangents):
    q, k, v, g, c, state, wide_maps = saved
    dy, dn, dstate = cotangents
    maps = tuple(x.astype(q.dtype) for x in wide_maps)
    B, T, N, S, K, H = plan.B, plan.T, plan.N, plan.S, plan.K, plan.H
    grid, runs = (B, S, H // plan.block), -(-plan.count // plan.run)

    ends = (
        _array(B, S, plan.count, plan.parts, H, plan.width), _array(B, S, plan.count, *plan.shape),
    )  # fmt: skip
    states = _call(
        _states_kernel, plan, grid, (k, v, g, c, state.kv, state.z, state.m, *maps),
        (*ends, _array(B, S, plan.count)), WARPS,
    )  # fmt: skip
    dq, a, b, since, *dq_maps = _call(
        _queries_kernel, plan, (B, N, runs * plan.cuts), (q, k, v, dy, dn, g, c, *states, *maps),
        (
            _array(*q.shape, dtype=q.dtype), _array(B, T, N), _array(B, T, N), _array(B, T, N),
            *(_array(B, runs, *x.shape) for x in maps[:1]),
        ), WARPS,
    )  # fmt: skip
    *dends, dkv, dz = _call(
        _state_cotangents_kernel, plan, grid, (q, dy, a, b, g, c, states[2], dstate.kv, dstate.z, *maps),
        (*ends, _array(B, S, plan.parts, H, plan.width), _array(B, S, *plan.shape)), WARPS,
    )  # fmt: skip
    # Where state heads share a key/value head, each leaves a cotangent of its own, and their sum is rounded once.
    shared = q.dtype if S == K else jnp.float32
    dk, filled, *dk_maps = _call(
        _keys_kernel, plan, (B, S, runs * plan.cuts), (q, k, v, dy, a, b, g, c, states[2], *dends, *maps),
        (
            _array(B, T, S, k.shape[-1], dtype=shared if maps else k.dtype), _array(B, T, S),
            *(_array(B, runs, *x.shape) for x in maps[1:]),
        ), WARPS,
    )  # fmt: skip
    since = jnp.sum(since.reshape(B, T, S, N // S), -1)
    kept = jnp.sum(states[0] * dends[0], (-3, -2, -1))
    kept += jnp.sum(states[1] * dends[1], (-2, -1))
    dv, dg, dc = _call(
        _values_kernel, plan, (B, S, plan.count),
        (q, k, v, dy, a, b, g, c, states[2], dends[0], filled, since, kept, *maps),
        (_array(B, T, S, H, dtype=shared), _array(B, T, S), _array(B, T, S)), WARPS,
    )  # fmt: skip
    if S != K:
        dv = jnp.sum(dv.reshape(B, T, K, S // K, -1), 3).astype(v.dtype)
        dk = jnp.sum(dk.reshape(B, T, K, S // K, -1), 3).astype(k.dtype) if maps else dk
    dmaps = tuple(
        jnp.sum(part, (0, 1)).astype(x.dtype) for part, x in zip((*dq_maps, *dk_maps), wide_maps, strict=True)
    )
    return dq, dk, dv, dg, dc, LinearState(dkv, dz, jnp.zeros_like(dstate.m)), dmaps


_attend.defvjp(_attend_fwd, _attend_bwd)


def _padded(q, k, v, g, c, state: LinearState, maps, act: Act | None, normalize: bool, chunk: int):
    """Pad, attend, and cut the padding off."""
    (B, T, N, _), (K, H) = q.shape, v.shape[2:]
    S, F = state.z.shape[1:]
    halves = 1 if act is None else 2
    half = F // halves
    width = min(_power_of_two(half), PIECE) if act is None else _power_of_two(half)
    parts = halves * (_power_of_two(half) // width)
    wide_H, wide_X = _power_of_two(H), _power_of_two(q.shape[-1])
    C = MAPPED_CHUNK if act or min(chunk, T) <= 16 else CHUNK
    plan = _Plan(
        B, T, N, S, K, wide_H, C, parts, width, 0 if act is None else half, wide_X, act, normalize, q.dtype,
        target.current().interpret,
    )  # fmt: skip

    def to_parts(x: Array) -> Array:
        x = _pad(x.reshape(B, S, halves, half, *x.shape[3:]), a3=parts * width // halves)
        return x.reshape(B, S, parts, width, *x.shape[4:])

    def from_parts(x: Array) -> Array:
        x = x.reshape(B, S, halves, parts * width // halves, *x.shape[4:])
        return x[:, :, :, :half].reshape(B, S, F, *x.shape[4:])

    q, k, v = _pad(q, a3=wide_X), _pad(k, a3=wide_X), _pad(v, a3=wide_H)
    maps = tuple(_pad(x, a1=wide_X, a2=width) for x in maps)
    before = LinearState(jnp.swapaxes(to_parts(_pad(state.kv, a3=wide_H)), -1, -2), to_parts(state.z), state.m)
    attended: Any = _attend(plan, q, k, v, g, c, before, maps)
    y, n, after = attended
    return y[..., :H], n, LinearState(from_parts(jnp.swapaxes(after.kv, -1, -2))[..., :H], from_parts(after.z), after.m)


def attend(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B T S F"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: LinearState,
    normalize: bool,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """The op from given features; arguments as ``problem.Implementation`` says, ``q``, ``k`` and ``v`` of one dtype."""
    return _padded(q, k, v, g, c, state, (), None, normalize, chunk)


def attend_mapped(
    q: Float[Array, "B T N X"],
    k: Float[Array, "B T K X"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: LinearState,
    q_map: Float[Array, "N X half"],
    k_map: Float[Array, "S X half"],
    act: Act,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """The op from raw queries and keys; every kernel computes the features it needs."""
    return _padded(q, k, v, g, c, state, (q_map, k_map), act, True, chunk)


def cannot_run(problem: Problem, place: target.Target) -> str | None:
    """Why these kernels cannot compute a problem on a target, in one line; None where they can."""
    if not place.interpret and place.platform != "gpu":
        return f"pallas_gpu runs on GPUs; this process has {place.platform}"
    if (unfit := target.unfit_gpu(place)) is not None:
        return f"pallas_gpu: {unfit}"
    if problem.vector_gates:
        return "gates are of one value per feature; pallas_gpu needs one per head"
    if problem.dtype not in (jnp.bfloat16, jnp.float32):
        return f"inputs are {jnp.dtype(problem.dtype).name}; pallas_gpu takes bfloat16 and float32"
    for name, size in (("F", problem.F), ("H", problem.H), ("X", problem.width)):
        if size is not None and (size % 16 or size > WIDEST):
            return f"{name} is {size}; pallas_gpu needs multiples of 16 up to {WIDEST}"
    return None


IMPLEMENTATION = Implementation(attend, attend_mapped, cannot_run)
