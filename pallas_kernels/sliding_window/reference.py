"""The definition: every query against every key, T × (W+T). What the other implementations are held to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import ABSENT, EMPTY, accumulator
from pallas_kernels.sliding_window.problem import Implementation
from pallas_kernels.sliding_window.rope import rotate, tables

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


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
    """As ``problem.Implementation.attend`` says, in one dense softmax."""
    (B, T, N, H), (total, K) = q.shape, k.shape[1:3]
    wide = accumulator(q.dtype)
    queries, keys = jnp.arange(T) + window, jnp.arange(total)
    if frequencies is not None:
        frequencies = frequencies.astype(wide)
        q, k = rotate(q, *tables(frequencies, queries)), rotate(k, *tables(frequencies, keys))
    q, k, values = (x.astype(wide) for x in (q, k, v))
    grouped = q.reshape(B, T, K, N // K, H)
    s = jnp.einsum("bikgh,bjkh->bkgij", grouped, k, precision=lax.Precision.HIGHEST) / jnp.sqrt(jnp.asarray(H, wide))

    near = (keys > queries[:, None] - window) & (keys <= queries[:, None])
    same = (q_segments[:, :, None] == k_segments[:, None, :]) & (q_segments[:, :, None] != 0)
    s = jnp.where((near & same)[:, None, None], s, EMPTY)
    sinks = jnp.broadcast_to(sink.astype(wide).reshape(K, N // K, 1), s.shape[:-1])
    sinks = jnp.where((q_segments != 0)[:, None, None], sinks, EMPTY)
    logits = jnp.concatenate([s, sinks[..., None]], axis=-1)

    top = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(logits > ABSENT, jnp.exp(jnp.where(logits > ABSENT, logits - top, 0.0)), 0.0)
    sums = jnp.sum(weights, axis=-1)
    there = sums > 0
    sums = jnp.where(there, sums, 1.0)
    n = jnp.where(there, jnp.log(sums) + top[..., 0], EMPTY)
    y = jnp.einsum("bkgij,bjkh->bikgh", weights[..., :-1] / sums[..., None], values, precision=lax.Precision.HIGHEST)
    return y.reshape(B, T, N, H).astype(v.dtype), jnp.moveaxis(n, 3, 1).reshape(B, T, N)


IMPLEMENTATION = Implementation(attend, lambda problem, target: None, kernel=False)
