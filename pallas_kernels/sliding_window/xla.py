"""The window in plain XLA: blocks of queries against their keys and the window before them, never T × T."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import ABSENT, EMPTY, accumulator
from pallas_kernels.sliding_window.problem import Implementation
from pallas_kernels.sliding_window.rope import rotate, tables

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

SMALLEST_BLOCK = 64
"""Queries handled together; below this the matmuls are too thin to be worth their launch."""
LARGEST_BLOCK = 1024
"""Queries of a window larger than this are handled in blocks of so many."""


def _blocks(x: Array, block: int, count: int) -> Array:
    """``[B, count·block, …]`` as ``[B, count, block, …]``, after padding with zeros."""
    pad = [(0, 0), (0, count * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad).reshape(x.shape[0], count, block, *x.shape[2:])


def _neighbourhoods(x: Array, window: int, block: int, count: int) -> Array:
    """``[B, W+T, …]`` as ``[B, count, W + block, …]``: each block of queries' keys and the window before them."""
    if count == 1:
        return _blocks(x, window + block, 1)
    before = _blocks(x[:, : count * block], block, count)[:, :, :window]
    return jnp.concatenate([before, _blocks(x[:, window:], block, count)], axis=2)


def _one_by_one(q, k, v, q_segments, k_segments, sink, frequencies, window):
    """``attend`` in blocks of ``LARGEST_BLOCK`` queries, one after the other."""
    time, block = q.shape[1], LARGEST_BLOCK
    count = -(-time // block)
    own = [_blocks(x, block, count) for x in (q, q_segments)]
    padded = [jnp.pad(x, [(0, 0), (0, count * block - time)] + [(0, 0)] * (x.ndim - 2)) for x in (k, v, k_segments)]

    @jax.checkpoint
    def part(number):
        queries, segments = (x[:, number] for x in own)
        near = [lax.dynamic_slice_in_dim(x, number * block, window + block, axis=1) for x in padded]
        return attend(queries, near[0], near[1], segments, near[2], sink, frequencies, window)

    y, n = lax.map(part, jnp.arange(count))
    y, n = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * block, *x.shape[3:])[:, :time] for x in (y, n))
    return y, n


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B WT K H"],
    v: Float[Array, "B WT K H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B WT"],
    sink: Float[Array, " N"],
    frequencies: Float[Array, " H/2"] | None,
    window: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """As ``problem.Implementation.attend`` says; the gradient is autodiff's.

    Beyond ``LARGEST_BLOCK`` queries and keys of a window, blocks run one after the other and are computed again in the
    backward pass, so that memory is one block's ``N · LARGEST_BLOCK · (W + LARGEST_BLOCK)`` scores.
    """
    if window > LARGEST_BLOCK and q.shape[1] > LARGEST_BLOCK:
        return _one_by_one(q, k, v, q_segments, k_segments, sink, frequencies, window)
    (B, T, N, H), K = q.shape, k.shape[2]
    wide = accumulator(q.dtype)
    # Half-precision operands are exact in one pass of a matrix unit; fp32 ones need all of its passes.
    precision = lax.Precision.DEFAULT if q.dtype.itemsize < 4 else lax.Precision.HIGHEST
    block = min(T, max(window, SMALLEST_BLOCK))
    count = -(-T // block)
    q, q_segments = (_blocks(x, block, count) for x in (q, q_segments))
    k, v, k_segments = (_neighbourhoods(x, window, block, count) for x in (k, v, k_segments))
    if frequencies is not None:
        cos, sin = tables(frequencies.astype(wide), jnp.arange(window + block))
        q, k = rotate(q, cos[window:], sin[window:]), rotate(k, cos, sin)

    # Heads in front and a key head's query heads below each other: plain matmuls, batched over leading axes alone.
    q = jnp.moveaxis(q.reshape(B, count, block, K, N // K, H), 2, 4).reshape(B, count, K, -1, H)
    k, v = jnp.moveaxis(k, 3, 2), jnp.moveaxis(v, 3, 2)
    row, column = jnp.arange(block)[:, None], jnp.arange(window + block)[None, :]
    band = (column > row) & (column <= row + window)
    same = (q_segments[..., :, None] == k_segments[..., None, :]) & (q_segments[..., :, None] != 0)
    visible = (band & same)[:, :, None, None]
    s = jnp.einsum("bckqh,bckjh->bckqj", q, k, precision=precision, preferred_element_type=wide)
    s = s.reshape(B, count, K, N // K, block, -1) * jnp.asarray(H**-0.5, wide)
    sinks = jnp.where((q_segments != 0)[:, :, None, None], sink.astype(wide).reshape(K, N // K, 1), EMPTY)
    top = lax.stop_gradient(jnp.maximum(jnp.max(jnp.where(visible, s, EMPTY), axis=-1), sinks))

    # Masked before exp: a masked score may be far above the row's maximum.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, s - top[..., None], 0.0)), 0.0)
    sunk = sinks > ABSENT
    total = jnp.sum(weights, axis=-1) + jnp.where(sunk, jnp.exp(jnp.where(sunk, sinks - top, 0.0)), 0.0)
    there = total > 0
    total = jnp.where(there, total, 1.0)
    n = jnp.where(there, jnp.log(total) + top, EMPTY)
    weights = weights.astype(v.dtype).reshape(B, count, K, -1, window + block)
    y = jnp.einsum("bckqj,bckjh->bckqh", weights, v, precision=precision, preferred_element_type=wide)
    y = y.reshape(*total.shape, H) / total[..., None]
    y, n = (jnp.moveaxis(x, 4, 2).reshape(B, count * block, N, *x.shape[5:])[:, :T] for x in (y, n))
    return y.astype(v.dtype), n


IMPLEMENTATION = Implementation(attend, lambda problem, target: None, kernel=False)
