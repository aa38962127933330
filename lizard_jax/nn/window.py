"""The softmax window with meta memory (Lizard §3.3, anchor window attention): banded, never T×T."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lizard_jax.config import RopeConfig
from lizard_jax.nn.numerics import ABSENT, accumulation_dtype, precision
from lizard_jax.nn.rope import cos_sin, inverse_frequencies, rotate
from lizard_jax.typing import Array, Float, Int

SMALLEST_BLOCK = 64
"""Queries handled together; below this the matmuls are too thin to be worth their launch."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MetaMemory:
    """What every query sees beside its window; absent parts are None.

    Attributes:
        sink: ``[N]`` a logit that adds exp(t) to the denominator and no value.
        learned_k, learned_v: ``[M, K, H]`` trained pairs, met without rotation.
        prefix_k, prefix_v: ``[B, 1 or T, M, K, H]`` the first M tokens of each query's document, unrotated.
    """

    sink: Float[Array, " N"] | None = None
    learned_k: Float[Array, "M K H"] | None = None
    learned_v: Float[Array, "M K H"] | None = None
    prefix_k: Float[Array, "B P M K H"] | None = None
    prefix_v: Float[Array, "B P M K H"] | None = None


def window_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B WT K H"],
    v: Float[Array, "B WT K H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B WT"],
    positions: Int[Array, "B T"],
    *,
    window: int,
    rope: RopeConfig | None,
    meta: MetaMemory,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax of q·k/√H over each query's last W keys and its meta memory.

    Args:
        k, v: the W tokens before the first query, then the T tokens of the queries, unrotated.
        q_segments, k_segments: document of each token; a query meets keys of its own alone, and 0 meets nothing.
        positions: of each query inside its document (read for ``prefix`` alone).
        rope: rotate q and k by their distance, or None for no rotation. Angles come from positions inside the
            block, never absolute ones, so they are as exact at position 10⁶ as at 0.

    Returns:
        The output (fp32, 0 for padding) and the log-normalizer (fp32), which includes the meta memory.
    """
    batch, time, heads, width = q.shape
    kv_heads = k.shape[2]
    dtype = accumulation_dtype(q)
    block = max(window, SMALLEST_BLOCK)
    block = time if time <= block else block
    blocks = -(-time // block)
    pad = blocks * block - time

    def query_blocks(a: Array) -> Array:
        return jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2)).reshape(batch, blocks, block, *a.shape[2:])

    def key_blocks(a: Array) -> Array:
        before = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        if blocks == 1:
            return before[:, None]
        head = before[:, : blocks * block].reshape(batch, blocks, block, *a.shape[2:])[:, :, :window]
        tail = before[:, window:].reshape(batch, blocks, block, *a.shape[2:])
        return jnp.concatenate([head, tail], axis=2)

    q_rows, k_rows, v_rows = query_blocks(q), key_blocks(k), key_blocks(v)
    scale = jnp.asarray(width**-0.5, dtype)
    if rope is not None:
        cos, sin = cos_sin(inverse_frequencies(rope, width), jnp.arange(window + block))
        q_turned = rotate(q_rows, cos[window:], sin[window:])
        k_turned = rotate(k_rows, cos, sin)
    else:
        q_turned, k_turned = q_rows, k_rows
    grouped = (batch, blocks, block, kv_heads, heads // kv_heads, width)

    def scores(query: Array, key: Array, pattern: str) -> Array:
        out = jnp.einsum(
            pattern, query.reshape(grouped), key, precision=precision(q), preferred_element_type=dtype
        )  # [B, blocks, K, G, queries, keys]
        return out * scale

    row, column = jnp.arange(block)[:, None], jnp.arange(window + block)[None, :]
    band = (column > row) & (column <= row + window)
    q_seg, k_seg = query_blocks(q_segments), key_blocks(k_segments)
    same = (q_seg[..., :, None] == k_seg[..., None, :]) & (q_seg[..., :, None] != 0)
    near_mask = (band & same)[:, :, None, None]
    parts = [(scores(q_turned, k_turned, "bcqkgh,bcjkh->bckgqj"), near_mask, v_rows, "bckgqj,bcjkh->bcqkgh")]

    if meta.learned_k is not None and meta.learned_v is not None:
        learned = scores(q_rows, meta.learned_k.astype(q.dtype), "bcqkgh,mkh->bckgqm")
        parts.append((learned, (q_seg != 0)[:, :, None, None, :, None], meta.learned_v, "bckgqm,mkh->bcqkgh"))
    if meta.prefix_k is not None and meta.prefix_v is not None:
        tokens = meta.prefix_k.shape[2]
        at, pk = query_blocks(positions), meta.prefix_k
        q_far = q_rows
        if rope is not None:
            frequencies = inverse_frequencies(rope, width)
            q_far = rotate(q_rows, *cos_sin(frequencies, jnp.minimum(at, window + tokens - 1)))
            pk = rotate(pk, *cos_sin(frequencies, jnp.arange(tokens)))
        # A prefix token still inside the window is counted there, once.
        seen = (jnp.arange(tokens) <= at[..., None] - window) & (q_seg != 0)[..., None]
        if pk.shape[1] == 1:
            pk, pv, key_axes = pk[:, 0], meta.prefix_v[:, 0], "bmkh"
        else:
            pk, pv, key_axes = query_blocks(pk), query_blocks(meta.prefix_v), "bcqmkh"
        far = scores(q_far, pk, f"bcqkgh,{key_axes}->bckgqm")
        parts.append((far, seen[:, :, None, None], pv, f"bckgqm,{key_axes}->bcqkgh"))

    top = jnp.full((batch, blocks, kv_heads, heads // kv_heads, block), ABSENT, dtype)
    for part, mask, _, _ in parts:
        top = jnp.maximum(top, jnp.where(mask, part, ABSENT).max(axis=-1))
    sink = None if meta.sink is None else meta.sink.astype(dtype).reshape(kv_heads, heads // kv_heads, 1)
    top = jax.lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))

    total = jnp.zeros_like(top) if sink is None else jnp.exp(sink - top)
    value = jnp.zeros(grouped, dtype)
    for part, mask, values, pattern in parts:
        # Masked before exp: a masked score may be far above the row's maximum.
        weight = jnp.where(mask, jnp.exp(jnp.where(mask, part - top[..., None], 0.0)), 0.0)
        total = total + weight.sum(axis=-1)
        value = value + jnp.einsum(
            pattern, weight.astype(q.dtype), values.astype(q.dtype), precision=precision(q),
            preferred_element_type=dtype,
        )  # fmt: skip
    there = total > 0
    total = jnp.where(there, total, 1.0)
    normalizer = jnp.where(there, jnp.log(total) + top, ABSENT)

    def rows(a: Array) -> Array:
        return jnp.moveaxis(a, 4, 2).reshape(batch, blocks, block, heads)

    value = value.reshape(batch, blocks, block, heads, width) / rows(total)[..., None]
    return (
        value.reshape(batch, blocks * block, heads, width)[:, :time],
        rows(normalizer).reshape(batch, blocks * block, heads)[:, :time],
    )
