"""The window as Pallas kernels for GPUs, compiled by Triton; nothing but JAX is needed.

Three kernels. Forward: one program per tile of queries and query head, which meets the tile's W + 32 keys tile by tile
with a running maximum. Queries' gradient: the same walk, with the normalizer at hand. Keys' gradient: one program per
tile of keys and key head, which meets the queries of its group that reach it. Nothing is repeated or added atomically.

A head comes as two halves, for rotation pairs their features. Each is padded with zeros to a power of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import target
from pallas_kernels.limits import PALLAS_GPU
from pallas_kernels.numerics import ABSENT, EMPTY
from pallas_kernels.pallas_triton import dot, launch, power_of_two
from pallas_kernels.sliding_window.problem import Implementation, Problem, differentiable
from pallas_kernels.sliding_window.rope import tables

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float

TILE = 32  # rows that a program owns
WALK = 64  # and columns that they meet at once; Triton splits the longer side of a chain of matmuls over the warps


class _Plan(NamedTuple):
    """Sizes as the kernels see them: ``half`` of a head is padded, ``H`` is the width that scales the scores."""

    B: int
    T: int
    N: int
    K: int
    H: int
    half: int
    W: int
    rope: bool
    dtype: Any
    interpret: bool


# --- inside the kernels: one tile -------------------------------------------------------------------------------------


class _Halves(NamedTuple):
    """Rows of a head, as its two halves."""

    first: Float[Array, "rows half"]
    second: Float[Array, "rows half"]

    def dot(self, other: _Halves) -> Float[Array, "rows others"]:
        return dot(self.first, other.first, (1, 1)) + dot(self.second, other.second, (1, 1))

    def weigh(self, weights: Float[Array, "out rows"]) -> _Halves:
        """Weighted sums of rows."""
        return _Halves(dot(weights, self.first), dot(weights, self.second))

    def plus(self, other: _Halves) -> _Halves:
        return _Halves(self.first + other.first, self.second + other.second)

    def times(self, factor) -> _Halves:
        return _Halves(self.first * factor, self.second * factor)

    def wide(self) -> _Halves:
        return _Halves(self.first.astype(jnp.float32), self.second.astype(jnp.float32))

    def turned(self, cos, sin, sign: float = 1.0) -> _Halves:
        first, second = self.wide()
        return _Halves(first * cos - sign * second * sin, second * cos + sign * first * sin)


def _zeros(rows: int, half: int) -> _Halves:
    return _Halves(*(jnp.zeros((rows, half), jnp.float32) for _ in range(2)))


class _Tile:
    """``size`` places from ``start`` of an axis of ``length``; loads are 0 and stores go nowhere beyond it."""

    def __init__(self, plan: _Plan, b, start, length: int, size: int = TILE):
        self.plan, self.b, self.rows = plan, b, pl.ds(start, size)
        self.places = start + lax.iota(jnp.int32, size)
        self.inside = self.places < length

    def load(self, ref, *index) -> Array:
        view = ref.at[(self.b, self.rows, *index)]
        return plgpu.load(view, mask=self.inside if len(view.shape) == 1 else self.inside[:, None], other=0)

    def store(self, ref, value: Array, *index) -> None:
        view = ref.at[(self.b, self.rows, *index)]
        mask = self.inside if len(view.shape) == 1 else self.inside[:, None]
        plgpu.store(view, value.astype(ref.dtype), mask=mask)

    def head(self, ref, head) -> _Halves:
        return _Halves(*(self.load(ref, head, pl.ds(at, self.plan.half)) for at in (0, self.plan.half)))

    def store_head(self, ref, value: _Halves, head) -> None:
        for part, at in zip(value, (0, self.plan.half), strict=True):
            self.store(ref, part, head, pl.ds(at, self.plan.half))

    def turn(self, x: _Halves, cos_ref, sin_ref, back: bool = False) -> _Halves:
        """Rotated by the angles of this tile's places, in fp32."""
        cos, sin = (
            plgpu.load(ref.at[self.rows, slice(None)], mask=self.inside[:, None], other=0) for ref in (cos_ref, sin_ref)
        )
        return x.turned(cos, sin, -1.0 if back else 1.0)


def _turned(tile: _Tile, x: _Halves, angles, back: bool = False) -> _Halves:
    """Rotated and rounded, where there is a rotation."""
    if not tile.plan.rope:
        return x
    turned = tile.turn(x, *angles, back=back)
    return turned if back else _Halves(*(part.astype(tile.plan.dtype) for part in turned))


def _visible(q_places, k_places, q_segments, k_segments, W: int) -> Bool[Array, "rows columns"]:
    """Of queries and keys, one as rows and one as columns; where there is none its segment is 0."""
    ahead = k_places - q_places
    return (ahead > 0) & (ahead <= W) & (q_segments == k_segments) & (q_segments != 0)


def _weights(s, visible, n) -> Float[Array, "rows columns"]:
    """``e^(s - n)`` where they meet; masked before exp."""
    return jnp.where(visible, jnp.exp(jnp.where(visible, s - n, 0.0)), 0.0)


# --- the kernels ------------------------------------------------------------------------------------------------------


def _query_walk(plan: _Plan, start) -> tuple[Any, Any]:
    """The first tile of keys that a tile of queries meets, and the one after the last."""
    last = jnp.minimum(start + TILE, plan.T) + plan.W
    return (start + 1) // WALK, (last + WALK - 1) // WALK


def _forward_kernel(q_ref, k_ref, v_ref, q_ids, k_ids, sink_ref, *refs, plan: _Plan):
    *angles, y_ref, n_ref = refs
    b, n, start = pl.program_id(0), pl.program_id(1), pl.program_id(2) * TILE
    head, queries = n // (plan.N // plan.K), _Tile(plan, b, start, plan.T)
    q = _turned(queries, queries.head(q_ref, n), angles[:2])
    ids = queries.load(q_ids)

    def body(at, carry):
        top, total, y = carry
        keys = _Tile(plan, b, at * WALK, plan.W + plan.T, WALK)
        k = _turned(keys, keys.head(k_ref, head), angles[2:])
        visible = _visible(
            queries.places[:, None], keys.places[None, :], ids[:, None], keys.load(k_ids)[None, :], plan.W
        )
        s = q.dot(k) * plan.H**-0.5
        higher = jnp.maximum(top, jnp.max(jnp.where(visible, s, EMPTY), 1))
        weights = _weights(s, visible, higher[:, None])
        lower = jnp.exp(top - higher)
        added = keys.head(v_ref, head).weigh(weights.astype(plan.dtype))
        return higher, total * lower + jnp.sum(weights, 1), y.times(lower[:, None]).plus(added)

    # A sink is a logit without a value: where the walk starts.
    sink = sink_ref[n]
    sunk = (ids != 0) & (sink > ABSENT)
    top, total = jnp.where(sunk, sink, EMPTY), jnp.where(sunk, 1.0, 0.0)
    first, last = _query_walk(plan, start)
    top, total, y = lax.fori_loop(first, last, body, (top, total, _zeros(TILE, plan.half)))
    there = total > 0
    safe = jnp.where(there, total, 1.0)
    queries.store_head(y_ref, y.times((1.0 / safe)[:, None]), n)
    queries.store(n_ref, jnp.where(there, top + jnp.log(safe), EMPTY), n)


def _queries_kernel(q_ref, k_ref, v_ref, q_ids, k_ids, dy_ref, n_ref, shift_ref, *refs, plan: _Plan):
    *angles, dq_ref = refs
    b, n, start = pl.program_id(0), pl.program_id(1), pl.program_id(2) * TILE
    head, queries = n // (plan.N // plan.K), _Tile(plan, b, start, plan.T)
    q, dy = _turned(queries, queries.head(q_ref, n), angles[:2]), queries.head(dy_ref, n)
    ids, normalizer, shift = queries.load(q_ids), queries.load(n_ref, n), queries.load(shift_ref, n)

    def body(at, dq: _Halves) -> _Halves:
        keys = _Tile(plan, b, at * WALK, plan.W + plan.T, WALK)
        k = _turned(keys, keys.head(k_ref, head), angles[2:])
        visible = _visible(
            queries.places[:, None], keys.places[None, :], ids[:, None], keys.load(k_ids)[None, :], plan.W
        )
        p = _weights(q.dot(k) * plan.H**-0.5, visible, normalizer[:, None])
        ds = p * (dy.dot(keys.head(v_ref, head)) + shift[:, None])
        return dq.plus(k.weigh(ds.astype(plan.dtype)))

    dq = lax.fori_loop(*_query_walk(plan, start), body, _zeros(TILE, plan.half)).times(plan.H**-0.5)
    queries.store_head(dq_ref, _turned(queries, dq, angles[:2], back=True), n)


def _keys_kernel(q_ref, k_ref, v_ref, q_ids, k_ids, dy_ref, n_ref, shift_ref, *refs, plan: _Plan):
    *angles, dk_ref, dv_ref = refs
    b, head, start = pl.program_id(0), pl.program_id(1), pl.program_id(2) * TILE
    rows, keys = plan.N // plan.K, _Tile(plan, b, start, plan.W + plan.T)
    k, v = _turned(keys, keys.head(k_ref, head), angles[2:]), keys.head(v_ref, head)
    ids = keys.load(k_ids)

    def body(at, carry):
        queries = _Tile(plan, b, at * WALK, plan.T, WALK)
        visible = _visible(
            queries.places[None, :], keys.places[:, None], queries.load(q_ids)[None, :], ids[:, None], plan.W
        )

        def read(r, carry):
            dk, dv = carry
            n = head * rows + r
            q, dy = _turned(queries, queries.head(q_ref, n), angles[:2]), queries.head(dy_ref, n)
            p = _weights(k.dot(q) * plan.H**-0.5, visible, queries.load(n_ref, n)[None, :])
            ds = p * (v.dot(dy) + queries.load(shift_ref, n)[None, :])
            return dk.plus(q.weigh(ds.astype(plan.dtype))), dv.plus(dy.weigh(p.astype(plan.dtype)))

        return lax.fori_loop(np.int32(0), np.int32(rows), read, carry)

    # Query i meets key j where j - W <= i < j.
    first = jnp.maximum(start - plan.W, 0) // WALK
    last = (jnp.minimum(start + TILE - 1, plan.T) + WALK - 1) // WALK
    dk, dv = lax.fori_loop(first, last, body, (_zeros(TILE, plan.half), _zeros(TILE, plan.half)))
    keys.store_head(dk_ref, _turned(keys, dk.times(plan.H**-0.5), angles[2:], back=True), head)
    keys.store_head(dv_ref, dv, head)


# --- around the kernels -----------------------------------------------------------------------------------------------


def _planned(q: Array, k: Array, frequencies: Array | None, window: int) -> tuple[_Plan, list[Array]]:
    """And the tables of angles: cosines and sines of the queries, then of the keys."""
    (B, T, N, H), K = q.shape, k.shape[2]
    plan = _Plan(
        B, T, N, K, H, power_of_two(H // 2), window, frequencies is not None, q.dtype, target.current().interpret
    )  # fmt: skip
    if frequencies is None:
        return plan, []
    frequencies = jnp.pad(frequencies.astype(jnp.float32), (0, plan.half - H // 2))
    places = jnp.arange(T + window, dtype=jnp.int32)
    return plan, [*tables(frequencies, places[window:]), *tables(frequencies, places)]


def _split(x: Array, plan: _Plan) -> Array:
    """Both halves of the heads padded with zeros."""
    if plan.half * 2 == plan.H:
        return x
    halves = x.reshape(*x.shape[:3], 2, plan.H // 2)
    return jnp.pad(halves, [(0, 0)] * 4 + [(0, plan.half - plan.H // 2)]).reshape(*x.shape[:3], -1)


def _join(x: Array, plan: _Plan) -> Array:
    """The inverse of ``_split``."""
    return x.reshape(*x.shape[:3], 2, plan.half)[..., : plan.H // 2].reshape(*x.shape[:3], plan.H)


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(q, k, v, q_segments, k_segments, sink, frequencies, window: int):
    plan, angles = _planned(q, k, frequencies, window)
    q, k, v = (_split(x, plan) for x in (q, k, v))
    grid = (plan.B, plan.N, -(-plan.T // TILE))
    outputs = (_shape(q), jax.ShapeDtypeStruct((plan.B, plan.T, plan.N), jnp.float32))
    y, n = launch(_forward_kernel, plan, grid, (q, k, v, q_segments, k_segments, sink, *angles), outputs)
    return _join(y, plan), n


def _backward(q, k, v, q_segments, k_segments, sink, frequencies, window: int, y, n, dy, dn):
    plan, angles = _planned(q, k, frequencies, window)
    shift = dn - jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), -1)
    there = (n > ABSENT) & (sink > ABSENT)
    dsink = jnp.sum(jnp.where(there, jnp.exp(jnp.where(there, sink - n, 0.0)), 0.0) * shift, (0, 1))
    q, k, v, dy = (_split(x, plan) for x in (q, k, v, dy))
    inputs = (q, k, v, q_segments, k_segments, dy, n, shift, *angles)
    dq = launch(_queries_kernel, plan, (plan.B, plan.N, -(-plan.T // TILE)), inputs, _shape(q))
    tiles = -(-(plan.T + window) // TILE)
    dk, dv = launch(_keys_kernel, plan, (plan.B, plan.K, tiles), inputs, (_shape(k), _shape(v)))
    return _join(dq, plan), _join(dk, plan), _join(dv, plan), dsink.astype(sink.dtype)


def cannot_run(problem: Problem, device: target.Target) -> str | None:
    """Why these kernels cannot compute a problem on a target, in one line; None where they can."""
    return PALLAS_GPU.refusal(device, problem.dtype, H=problem.H)


IMPLEMENTATION = Implementation(differentiable(_forward, _backward), cannot_run)
