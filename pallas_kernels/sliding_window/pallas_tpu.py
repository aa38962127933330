"""The window on TPUs: one Mosaic kernel forward, one backward, each reading every array once (keys: and a window more).

The grid runs over batch rows, key heads and blocks of queries. A block's keys, its own and the window before them, lie
in VMEM as one slab that its G query heads share. Inside, tiles of 128 queries meet their W + 128 keys in one piece: no
running maximum, and the backward pass has ``Σ_j p_ij (dy_i·v_j)`` at hand without y. Scores stand keys × queries, so
that whatever belongs to a query (maximum, normalizer, sink, segment) is a row of lanes, which is also how it is stored.

Query blocks reach keys in increasing order, so the backward pass adds up dk and dv of a slab in VMEM, writes the part
that no later query meets, and carries the rest.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import target
from pallas_kernels.limits import PALLAS_TPU
from pallas_kernels.numerics import ABSENT, EMPTY
from pallas_kernels.sliding_window.problem import Implementation, Problem, differentiable
from pallas_kernels.sliding_window.rope import tables
from pallas_kernels.staggered import staggered

if TYPE_CHECKING:
    from jax import Array

TILE = 128
"""Queries of a tile, and the lanes of a vector register."""

LARGEST_BLOCK = 512
VMEM = 12 << 20
"""What a kernel may plan for, in bytes; of the 16 MiB that a TPU gives it by default, the compiler wants some."""


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _width(H: int) -> int:
    """H in whole registers: either half of a head takes 64 lanes or a multiple."""
    return _round_up(H, 128)


def _vmem(block: int, span: int, G: int, width: int, itemsize: int) -> int:
    """Bytes of the backward pass: what it pipelines (each buffer twice), what it sums up, and a tile's scores."""
    slab = block + span
    queries = 3 * 2 * block * G * width * itemsize  # q, dy, dq
    keys = 2 * 2 * slab * width * itemsize + 2 * 2 * block * width * itemsize  # k, v; dk, dv
    turns, sums = 2 * 2 * slab * width * 4, 3 * slab * width * 4
    return queries + keys + turns + sums + 6 * (span + TILE) * TILE * 4


def _block(T: int, span: int, G: int, width: int, itemsize: int) -> int:
    """Queries of a grid step: as many as fit, for fewer keys are read twice then; at least one tile."""
    block = min(LARGEST_BLOCK, _round_up(T, TILE))
    while block > TILE and _vmem(block, span, G, width, itemsize) > VMEM:
        block -= TILE
    return block


class _Layout:
    """Sizes of a call, and its arrays as the kernels want them: whole blocks, heads side by side in the lanes."""

    def __init__(self, q: Array, k: Array, window: int):
        self.B, self.T, self.N, self.H = q.shape
        self.K, self.window = k.shape[2], window
        self.G, self.width = self.N // self.K, _width(self.H)
        self.span = _round_up(window, TILE)  # keys before a block
        self.block = _block(self.T, self.span, self.G, self.width, q.dtype.itemsize)
        self.blocks = -(-self.T // self.block)
        self.padded = self.blocks * self.block
        self.slab = self.span + self.block

    def _lanes(self, x: Array, before: int, after: int) -> Array:
        half = (self.width - self.H) // 2
        x = x.reshape(*x.shape[:3], 2, self.H // 2)
        if before or after or half:
            x = jnp.pad(x, [(0, 0), (before, after), (0, 0), (0, 0), (0, half)])
        return x.reshape(*x.shape[:2], -1)

    def queries(self, x: Array) -> Array:
        """``[B, T, N, H]`` as ``[B, blocks·block, N·width]``."""
        return self._lanes(x, 0, self.padded - self.T)

    def keys(self, x: Array) -> Array:
        """``[B, W+T, K, H]`` as ``[B, span + blocks·block, K·width]``."""
        return self._lanes(x, self.span - self.window, self.padded - self.T)

    def rows(self, x: Array) -> Array:
        """``[B, T, N]`` as ``[B, K, G, blocks·block]``."""
        x = jnp.pad(x, [(0, 0), (0, self.padded - self.T), (0, 0)])
        return jnp.moveaxis(x, 1, 2).reshape(self.B, self.K, self.G, self.padded)

    def segments(self, q_segments: Array, k_segments: Array) -> tuple[Array, Array]:
        """Each as one row of lanes, ``[B, 1, …]``."""
        after = self.padded - self.T
        q_segments = jnp.pad(q_segments, [(0, 0), (0, after)])
        k_segments = jnp.pad(k_segments, [(0, 0), (self.span - self.window, after)])
        return q_segments[:, None], k_segments[:, None]

    def turns(self, frequencies: Array | None) -> list[Array]:
        """Cosines and signed sines of the slab's positions, ``[slab, width]`` each; none for no rotation."""
        if frequencies is None:
            return []
        cos, sin = tables(frequencies, jnp.arange(self.slab))
        pad = [(0, 0), (0, self.width // 2 - self.H // 2)]
        cos, sin = jnp.pad(cos, pad), jnp.pad(sin, pad)
        return [jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)]

    def from_lanes(self, x: Array, start: int, length: int, heads: int) -> Array:
        x = x[:, start : start + length].reshape(self.B, length, heads, 2, self.width // 2)
        return x[..., : self.H // 2].reshape(self.B, length, heads, self.H)

    def from_rows(self, x: Array) -> Array:
        return jnp.moveaxis(x.reshape(self.B, self.N, self.padded)[..., : self.T], 1, 2)

    def specs(self) -> dict[str, Any]:
        """Blocks of a step (batch row, key head, block of queries); steps after the last block stay on it."""
        last, block, slab = self.blocks - 1, self.block, self.slab

        def step(i):
            return jnp.minimum(i, last)

        return {
            "sink": pl.BlockSpec(memory_space=pltpu.SMEM),
            "turn": pl.BlockSpec((slab, self.width), lambda b, h, i: (0, 0)),
            "q_segments": pl.BlockSpec((None, 1, block), lambda b, h, i: (b, 0, step(i))),
            "k_segments": pl.BlockSpec(
                (pl.Squeezed(), pl.Element(1), pl.Element(slab)), lambda b, h, i: (b, 0, step(i) * block)
            ),
            "queries": pl.BlockSpec((None, block, self.G * self.width), lambda b, h, i: (b, step(i), h)),
            "keys": pl.BlockSpec(
                (pl.Squeezed(), pl.Element(slab), pl.Element(self.width)),
                lambda b, h, i: (b, step(i) * block, h * self.width),
            ),
            "rows": pl.BlockSpec((None, None, self.G, block), lambda b, h, i: (b, h, 0, step(i))),
            "finished": pl.BlockSpec((None, block, self.width), lambda b, h, i: (b, i, h)),
        }


def _turn(x: Array, turns: list[Any], rows: slice, back: bool = False) -> Array:
    """Rotate fp32 rows ``[rows, width]`` by their positions in the slab, or back."""
    if not turns:
        return x
    cos, sin = (table[rows, :] for table in turns)
    other = pltpu.roll(x, x.shape[1] // 2, 1) * sin
    return x * cos - other if back else x * cos + other


class _Tile(NamedTuple):
    """Its queries in the block, its keys in the slab, and which meet, ``[keys, TILE]``."""

    queries: slice
    keys: slice
    visible: Array


def _tile(layout: _Layout, q_segments, k_segments, r: int) -> _Tile:
    """Tile r of the block."""
    keys = slice(r * TILE, r * TILE + TILE + layout.span)
    rows = slice(r * TILE, r * TILE + TILE)
    shape = (TILE + layout.span, TILE)
    ahead = lax.broadcasted_iota(jnp.int32, shape, 0) - lax.broadcasted_iota(jnp.int32, shape, 1)
    of_query = q_segments[:, rows]
    of_key = jnp.broadcast_to(k_segments[:, keys], shape[::-1]).T
    near = (ahead > layout.span - layout.window) & (ahead <= layout.span)
    return _Tile(rows, keys, near & (of_key == of_query) & (of_query != 0))


def _dots(precision: lax.Precision):
    """Matmuls with fp32 accumulation: ``a bᵀ``, ``aᵀ b`` and ``a b``."""

    def dot(contract):
        return functools.partial(
            lax.dot_general, dimension_numbers=(contract, ((), ())), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    return dot(((1,), (1,))), dot(((0,), (0,))), dot(((1,), (0,)))


def _precision(dtype: jnp.dtype) -> lax.Precision:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _window_forward(layout: _Layout, turned: bool, sink, *refs):
    turns, (q_segments, k_segments, q, k, v, y, n) = list(refs[: 2 * turned]), refs[2 * turned :]
    a_bt, _, a_b = _dots(_precision(q.dtype))
    scale, width, head = layout.H**-0.5, layout.width, pl.program_id(1)
    slab = _turn(k[...].astype(jnp.float32), turns, slice(None)).astype(k.dtype)
    values = v[...].T
    tiles = [_tile(layout, q_segments, k_segments, r) for r in range(layout.block // TILE)]

    def query(item: int) -> Array:
        r, g = divmod(item, layout.G)
        here = slice(layout.span + r * TILE, layout.span + r * TILE + TILE)
        raw = q[tiles[r].queries, g * width : (g + 1) * width].astype(jnp.float32)
        return _turn(raw, turns, here).astype(q.dtype)

    def meet(item: int, query: Array) -> Array:
        return a_bt(slab[tiles[item // layout.G].keys], query)

    def weigh(item: int, s: Array) -> tuple[Array, Array, Array]:
        tile, g = tiles[item // layout.G], item % layout.G
        s = jnp.where(tile.visible, s * scale, EMPTY)
        logit = jnp.where(q_segments[:, tile.queries] != 0, sink[head, g], EMPTY)
        top = jnp.maximum(jnp.max(s, axis=0, keepdims=True), logit)
        top = jnp.maximum(top, ABSENT)  # so that what is absent weighs 0 where all is
        weights = jnp.exp(s - top)
        total = jnp.sum(weights, axis=0, keepdims=True) + jnp.exp(logit - top)
        return a_b(values[:, tile.keys], weights.astype(v.dtype)), top, total

    def write(item: int, read: tuple[Array, Array, Array]) -> None:
        tile, g = tiles[item // layout.G], item % layout.G
        (num, top, total), there = read, read[2] > 0
        total = jnp.where(there, total, 1.0)
        y[tile.queries, g * width : (g + 1) * width] = (num * (1.0 / total)).astype(y.dtype).T
        n[g : g + 1, tile.queries] = jnp.where(there, top + jnp.log(total), EMPTY)

    staggered(len(tiles) * layout.G, query, meet, weigh, write)


def _window_backward(layout: _Layout, turned: bool, sink, *refs):
    turns, refs = list(refs[: 2 * turned]), refs[2 * turned :]
    q_segments, k_segments, q, k, v, n, dy, dn, dq, dk, dv, dsink, dk_slab, dv_sum, dk_sum = refs
    a_bt, at_b, a_b = _dots(_precision(q.dtype))
    scale, width, head, step = layout.H**-0.5, layout.width, pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(step < layout.blocks)
    def _():
        slab = _turn(k[...].astype(jnp.float32), turns, slice(None)).astype(k.dtype)
        dk_slab[...] = jnp.zeros_like(dk_slab)
        tiles = [_tile(layout, q_segments, k_segments, r) for r in range(layout.block // TILE)]

        def place(item: int) -> tuple[_Tile, int, slice, slice]:
            r, g = divmod(item, layout.G)
            start = layout.span + r * TILE
            return tiles[r], g, slice(g * width, (g + 1) * width), slice(start, start + TILE)

        def query(item: int) -> Array:
            tile, _, lanes, here = place(item)
            return _turn(q[tile.queries, lanes].astype(jnp.float32), turns, here).astype(q.dtype)

        def meet(item: int, query: Array) -> tuple[Array, Array, Array, Array]:
            tile, _, lanes, _ = place(item)
            cotangent = dy[tile.queries, lanes]
            return query, cotangent, a_bt(slab[tile.keys], query), a_bt(v[tile.keys, :], cotangent)

        def turn_back(item: int, met: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array]:
            (tile, g, _, _), (query, cotangent, s, dp) = place(item), met
            normalizer = n[g : g + 1, tile.queries]
            p = jnp.where(tile.visible, jnp.exp(s * scale - normalizer), 0.0)
            gain = dn[g : g + 1, tile.queries] - jnp.sum(p * dp, axis=0, keepdims=True)
            ds = (p * (dp + gain)).astype(q.dtype)
            share = jnp.where(normalizer > ABSENT, jnp.exp(sink[head, g] - normalizer), 0.0)
            dsink[g : g + 1, tile.queries] = share * gain
            return at_b(ds, slab[tile.keys]), a_b(ds, query), a_b(p.astype(q.dtype), cotangent)

        def add(item: int, grads: tuple[Array, Array, Array]) -> None:
            tile, _, lanes, here = place(item)
            of_q, of_k, of_v = grads
            dq[tile.queries, lanes] = _turn(of_q * scale, turns, here, back=True).astype(dq.dtype)
            dk_slab[tile.keys, :] += of_k
            dv_sum[tile.keys, :] += of_v

        staggered(len(tiles) * layout.G, query, meet, turn_back, add)
        dk_sum[...] += _turn(dk_slab[...] * scale, turns, slice(None), back=True)

    # No later query meets the first block of the slab; the rest is the start of the next one.
    for total, out in ((dk_sum, dk), (dv_sum, dv)):
        out[...] = total[: layout.block, :].astype(out.dtype)
        rest = total[layout.block :, :]
        total[: layout.span, :] = rest
        total[layout.span :, :] = jnp.zeros((layout.block, width), jnp.float32)


def _call(
    kernel,
    layout: _Layout,
    steps: int,
    sink: Array,
    frequencies: Array | None,
    inputs: list[tuple[str, Array]],
    outputs: list[tuple[str, jax.ShapeDtypeStruct]],
    scratch: list[Any],
) -> list[Array]:
    """Run a kernel; what it reads and writes is told by array and by the name of its blocks."""
    specs, turns = layout.specs(), layout.turns(frequencies)
    inputs = [("sink", sink.reshape(layout.K, layout.G)), *(("turn", x) for x in turns), *inputs]
    run = pl.pallas_call(
        functools.partial(kernel, layout, bool(turns)),
        grid=(layout.B, layout.K, steps),
        in_specs=[specs[name] for name, _ in inputs],
        out_specs=[specs[name] for name, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=pltpu.InterpretParams(detect_races=True) if target.current().interpret else False,
        name=kernel.__name__.strip("_"),
    )
    return run(*(x for _, x in inputs))


def _forward(q, k, v, q_segments, k_segments, sink, frequencies, window):
    layout = _Layout(q, k, window)
    q_segments, k_segments = layout.segments(q_segments, k_segments)
    rows = (layout.B, layout.K, layout.G, layout.padded)
    lanes = (layout.B, layout.padded, layout.N * layout.width)
    y, n = _call(
        _window_forward, layout, layout.blocks, sink, frequencies,
        [
            ("q_segments", q_segments), ("k_segments", k_segments),
            ("queries", layout.queries(q)), ("keys", layout.keys(k)), ("keys", layout.keys(v)),
        ],
        [("queries", jax.ShapeDtypeStruct(lanes, v.dtype)), ("rows", jax.ShapeDtypeStruct(rows, jnp.float32))],
        [],
    )  # fmt: skip
    return layout.from_lanes(y, 0, layout.T, layout.N), layout.from_rows(n)


def _backward(q, k, v, q_segments, k_segments, sink, frequencies, window, y, n, dy, dn):
    del y  # each tile has all keys of its queries, and their p·dv with them
    layout = _Layout(q, k, window)
    q_segments, k_segments = layout.segments(q_segments, k_segments)
    rows = jax.ShapeDtypeStruct((layout.B, layout.K, layout.G, layout.padded), jnp.float32)
    lanes = jax.ShapeDtypeStruct((layout.B, layout.padded, layout.N * layout.width), q.dtype)
    keys = layout.padded + layout.span
    sums = jax.ShapeDtypeStruct((layout.B, keys, layout.K * layout.width), k.dtype)
    slab = pltpu.VMEM((layout.slab, layout.width), jnp.float32)
    dq, dk, dv, dsink = _call(
        _window_backward, layout, -(-keys // layout.block), sink, frequencies,
        [
            ("q_segments", q_segments), ("k_segments", k_segments),
            ("queries", layout.queries(q)), ("keys", layout.keys(k)), ("keys", layout.keys(v)),
            ("rows", layout.rows(n)), ("queries", layout.queries(dy)), ("rows", layout.rows(dn)),
        ],
        [("queries", lanes), ("finished", sums), ("finished", sums), ("rows", rows)],
        [slab, slab, slab],
    )  # fmt: skip
    dk, dv = (layout.from_lanes(x, layout.span - window, layout.T + window, layout.K) for x in (dk, dv))
    dsink = jnp.sum(layout.from_rows(dsink), axis=(0, 1))
    return layout.from_lanes(dq, 0, layout.T, layout.N), dk, dv, dsink


def _cannot_run(problem: Problem, where: target.Target) -> str | None:
    if (refusal := PALLAS_TPU.refusal(where, problem.dtype, H=problem.H)) is not None:
        return refusal
    span, G = _round_up(problem.W, TILE), problem.N // problem.K
    needed = _vmem(TILE, span, G, _width(problem.H), problem.dtype.itemsize)
    if needed > VMEM:
        return f"W={problem.W}, H={problem.H} and N/K={G} need {needed >> 20} MiB of VMEM; pallas_tpu has {VMEM >> 20}"
    return None


IMPLEMENTATION = Implementation(differentiable(_forward, _backward), _cannot_run)
