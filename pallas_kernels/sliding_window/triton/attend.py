"""The window through Triton: what is launched, over which grid, in which tiles; ``kernels`` has the arithmetic."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels import triton_launch, tuned
from pallas_kernels.limits import TRITON
from pallas_kernels.numerics import ABSENT
from pallas_kernels.sliding_window.problem import Implementation, Problem, differentiable
from pallas_kernels.sliding_window.rope import tables
from pallas_kernels.target import Target, current

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work.

    Attributes:
        rows: (token, query head) pairs of a tile, those of one key head beside one another.
        keys: keys of a tile.
        warps, stages: warps of a program, and depth of the pipeline of its loop.
    """

    rows: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile


MOST_GROUPED = 64
"""Query heads of one key head; a tile holds those of a token at least."""

# By bytes of an operand and the power of two that holds a head: what neither spills registers on sm_80 and sm_90 nor
# exceeds their shared memory, with few enough keys that the band's two ragged ends cost little.
_TILES = {
    (2, 64): Tiles(Tile(128, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
    (2, 128): Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(32, 32, 4, 2)),
    (2, 256): Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (4, 32): Tiles(Tile(128, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)),
    (4, 64): Tiles(Tile(128, 32, 8, 2), Tile(32, 16, 8, 2), Tile(32, 32, 4, 2)),
    (4, 128): Tiles(Tile(32, 32, 8, 2), Tile(32, 16, 8, 2), Tile(32, 32, 8, 1)),
    (4, 256): Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 2), Tile(16, 16, 8, 1)),
}


def tiles_of(width: int, dtype: jnp.dtype) -> Tiles:
    """The tiles for heads of a width, by rule."""
    size = jnp.dtype(dtype).itemsize
    return _TILES[size, max(_power_of_two(width), 64 if size == 2 else 32)]


def key(problem: Problem, chip: str | None) -> dict[str, Any]:
    """What a measurement in bf16 is for."""
    sizes = {"H": problem.H, "W": problem.W, "G": problem.N // problem.K}
    return {"op": "sliding_window", "chip": chip} | sizes | {"rope": problem.rope}


def from_row(choice: dict[str, Any]) -> Tiles:
    """Tiles from their fields as a table has them."""
    return Tiles(**{name: Tile(**sizes) for name, sizes in choice.items()})


def tiles(q: Float[Array, "B T N H"], k: Float[Array, "B WT K H"], window: int, rope: bool) -> Tiles:
    """What was measured to be fastest for such problems, else what the rules say."""
    (B, T, N, H), K = q.shape, k.shape[2]
    here = key(Problem(B, T, N, K, H, window, q.dtype, rope), current().chip)
    measured = tuned.choice(here if q.dtype.itemsize == 2 and T >= 128 else None)
    return tiles_of(H, q.dtype) if measured is None else from_row(measured)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _constants(q: Array, k: Array, frequencies: Array | None, window: int, tile: Tile) -> dict[str, Any]:
    (_, T, N, H), K = q.shape, k.shape[2]
    rows = max(tile.rows, _power_of_two(N // K))
    return {
        "T": T,
        "N": N,
        "K": K,
        "HALF": H // 2,
        "WINDOW": window,
        "TO_BASE2": math.log2(math.e) / math.sqrt(H),
        "ROPE": frequencies is not None,
        "TOKENS": rows // (N // K),
        "ROWS": rows,
        "KEYS": tile.keys,
        "HALF_TILE": max(16, _power_of_two(H // 2)),
        "WIDTH_TILE": _power_of_two(H),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _angles(frequencies: Array | None, indices: int) -> tuple[Array, Array]:
    """Cosines and sines of so many indices; without rotation, arrays that no kernel reads."""
    if frequencies is None:
        return jnp.zeros((1,), jnp.float32), jnp.zeros((1,), jnp.float32)
    return tables(frequencies.astype(jnp.float32), jnp.arange(indices))


def _forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B WT K H"],
    v: Float[Array, "B WT K H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B WT"],
    sink: Float[Array, " N"],
    frequencies: Float[Array, " H/2"] | None,
    window: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    from pallas_kernels.sliding_window.triton import kernels

    (B, T, N), K = q.shape[:3], k.shape[2]
    tile = tiles(q, k, window, frequencies is not None).forward
    constants = _constants(q, k, frequencies, window, tile)
    return triton_launch.launch(
        kernels.window_forward,
        *(q, k, v, q_segments, k_segments, sink, *_angles(frequencies, window + T)),
        out_shape=(jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((B, T, N), jnp.float32)),
        grid=(-(-T // constants["TOKENS"]), K, B),
        **constants,
    )


def _backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B WT K H"],
    v: Float[Array, "B WT K H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B WT"],
    sink: Float[Array, " N"],
    frequencies: Float[Array, " H/2"] | None,
    window: int,
    y: Float[Array, "B T N H"],
    n: Float[Array, "B T N"],
    dy: Float[Array, "B T N H"],
    dn: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B WT K H"], Float[Array, "B WT K H"], Float[Array, " N"]]:
    from pallas_kernels.sliding_window.triton import kernels

    (B, T, N, H), K = q.shape, k.shape[2]
    how = tiles(q, k, window, frequencies is not None)
    like = jax.ShapeDtypeStruct
    scale = 1 / math.sqrt(H)

    constants = _constants(q, k, frequencies, window, how.query_gradient)
    dq, dscore = triton_launch.launch(
        kernels.window_query_gradient,
        *(q, k, v, q_segments, k_segments, *_angles(frequencies, window + T), y, n, dy, dn),
        out_shape=(like(q.shape, q.dtype), like((B, T, N), jnp.float32)),
        grid=(-(-T // constants["TOKENS"]), K, B),
        SCALE=scale,
        **constants,
    )
    constants = _constants(q, k, frequencies, window, how.key_gradient)
    dk, dv = triton_launch.launch(
        kernels.window_key_gradient,
        *(q, k, v, q_segments, k_segments, *_angles(frequencies, window + T), n, dy, dscore),
        out_shape=(like(k.shape, k.dtype), like(v.shape, v.dtype)),
        grid=(-(-(window + T) // constants["KEYS"]), K, B),
        SCALE=scale,
        **constants,
    )
    here = (n > ABSENT) & (sink > ABSENT)
    share = jnp.where(here, jnp.exp(jnp.where(here, sink - n, 0.0)), 0.0)
    return dq, dk, dv, jnp.sum(share * dscore, axis=(0, 1))


def _cannot_run(problem: Problem, target: Target) -> str | None:
    if (refusal := TRITON.refusal(target, problem.dtype, H=problem.H)) is not None:
        return refusal
    if problem.N // problem.K > MOST_GROUPED:
        return f"{problem.N // problem.K} query heads share a key head; triton takes at most {MOST_GROUPED}"
    return None


IMPLEMENTATION = Implementation(differentiable(_forward, _backward), _cannot_run)
