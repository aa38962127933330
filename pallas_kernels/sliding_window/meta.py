"""Meta tokens: a second, tiny attention over M keys outside the band, merged with the window by log-normalizers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import EMPTY, accumulator
from pallas_kernels.sliding_window.rope import rotate, tables

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Bool, Float, Int


def merge(
    parts: list[tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]], dtype: jnp.dtype
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmaxes over disjoint keys, each as (output, log-normalizer), as the one softmax over all of their keys."""
    wide = parts[0][1].dtype
    n = jnp.stack([n for _, n in parts])
    top = lax.stop_gradient(jnp.max(n, axis=0))
    weights = jnp.exp(n - top)
    total = jnp.sum(weights, axis=0)
    y = sum(w[..., None] * y.astype(wide) for w, (y, _) in zip(weights / total, parts, strict=True))
    return jnp.asarray(y).astype(dtype), top + jnp.log(total)


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B P M K H"],
    v: Float[Array, "B P M K H"],
    visible: Bool[Array, "B T M"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Dense softmax over the meta tokens that each query meets, unrounded; P is 1 or T."""
    (B, T, N, H), (P, M, K) = q.shape, k.shape[1:4]
    wide = accumulator(q.dtype)
    precision = lax.Precision.DEFAULT if q.dtype.itemsize < 4 else lax.Precision.HIGHEST
    grouped = q.reshape(B, P, T // P, K, N // K, H)
    s = jnp.einsum("bptkgh,bpmkh->bptkgm", grouped, k, precision=precision, preferred_element_type=wide)
    s = s.reshape(B, T, N, M) * jnp.asarray(H**-0.5, wide)
    seen = visible[:, :, None]
    top = lax.stop_gradient(jnp.max(jnp.where(seen, s, EMPTY), axis=-1))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, s - top[..., None], 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1)
    there = total > 0
    total = jnp.where(there, total, 1.0)
    weights = (weights / total[..., None]).reshape(B, P, T // P, K, N // K, M)
    y = jnp.einsum(
        "bptkgm,bpmkh->bptkgh", weights.astype(q.dtype), v.astype(q.dtype), precision=precision,
        preferred_element_type=wide,
    )  # fmt: skip
    return y.reshape(B, T, N, H), jnp.where(there, jnp.log(total) + top, EMPTY)


def attend_learned(
    q: Float[Array, "B T N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    q_segments: Int[Array, "B T"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention to M trained pairs, which every query that is not padding meets without rotation."""
    shape = (q.shape[0], 1, *k.shape)
    visible = jnp.broadcast_to((q_segments != 0)[..., None], (*q_segments.shape, k.shape[0]))
    return _attend(q, jnp.broadcast_to(k, shape).astype(q.dtype), jnp.broadcast_to(v, shape), visible)


def attend_prefix(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B P M K H"],
    v: Float[Array, "B P M K H"],
    q_segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " H/2"] | None,
    window: int,
    last: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention to the first M tokens of each query's document that have left its window (there they count already).

    Prefix token t sits at position t and its query at ``min(position, last)``: distances beyond are not told apart.
    ``last`` is W + M - 1 where nothing is said, so that angles stay small.
    """
    tokens = k.shape[2]
    if frequencies is not None:
        frequencies = frequencies.astype(accumulator(q.dtype))
        q = rotate(q, *tables(frequencies, jnp.minimum(positions, window + tokens - 1 if last is None else last)))
        k = rotate(k, *tables(frequencies, jnp.arange(tokens)))
    gone = jnp.arange(tokens, dtype=positions.dtype) <= positions[..., None] - window
    visible = gone & (q_segments != 0)[..., None]
    return _attend(q, k, v, visible)


def beside(
    q: Float[Array, "B T N H"],
    q_segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    window: int,
    frequencies: Float[Array, " H/2"] | None,
    sink: Float[Array, " N"] | None,
    learned: tuple[Array, Array] | None,
    prefix: tuple[Array, Array] | None,
    last: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """All meta memory of a query as one softmax beside its window: arguments as ``sliding_window`` has them,
    and ``last`` as ``attend_prefix``."""
    wide = accumulator(q.dtype)
    logit = jnp.full((q.shape[2],), EMPTY, wide) if sink is None else sink.astype(wide)
    sunk = jnp.where((q_segments != 0)[..., None], logit, EMPTY)
    parts = [(jnp.zeros(q.shape, wide), sunk)]
    if learned is not None:
        parts.append(attend_learned(q, *learned, q_segments))
    if prefix is not None:
        parts.append(attend_prefix(q, *prefix, q_segments, positions, frequencies, window, last))
    return parts[0] if len(parts) == 1 else merge(parts, wide)
