"""The teacher's attention: causal softmax over rotated keys, grouped-query, with documents and sliding windows."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lizard_jax.config import ModelConfig
from lizard_jax.errors import UserError
from lizard_jax.nn.cache import KVCache
from lizard_jax.nn.causal_blocks import BLOCK, blockwise_attention
from lizard_jax.nn.head_sets import for_devices
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.reuse import shared
from lizard_jax.nn.rope import cos_sin, inverse_frequencies, rotate, segment_lengths, segment_positions, segment_starts
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import flash, partition, target
from pallas_kernels.partition import BATCH, TOKENS

QUERY_BLOCK = 512
FEWEST_QUERIES = 16
"""Below this keys and values are read as they lie."""
CAUSAL_PARTS = 2
"""On an accelerator a causal pass goes over this many parts of the queries, each with the keys up to its end: 3/4 of
the work. Every part is compiled for itself, in every layer; more of them take more compiling than a run saves."""


def interval_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    first: Int[Array, "#B T"],
    last: Int[Array, "#B T"],
) -> Float[Array, "B T N H"]:
    """``softmax(q kᵀ/√H) v`` where query t sees keys ``first[t] … last[t]``; an empty interval gives 0.

    Scores, softmax and the sum over values are float32. Above twice ``QUERY_BLOCK`` queries run block by block and
    are recomputed in the backward pass, so memory is ``N · QUERY_BLOCK · S``. Query heads of a group share their
    key head without a copy of it.
    """
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    wide = accumulation_dtype(q)
    index = jnp.arange(k.shape[1], dtype=jnp.int32)
    # Heads in front and a group's query heads below each other: plain matmuls, batched over leading axes alone. A step
    # of generation reads a long cache once, and would pay for turning it.
    keys = "bskh"
    if length >= FEWEST_QUERIES:
        keys, k, v = "bksh", jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)

    def attend(queries: Array, lowest: Array, highest: Array) -> Array:
        count = queries.shape[1]
        grouped = jnp.moveaxis(queries.reshape(batch, count, groups, heads // groups, head_dim), 1, 3)
        grouped = grouped.reshape(batch, groups, -1, head_dim)
        scores = jnp.einsum(f"bkth,{keys}->bkts", grouped, k, preferred_element_type=wide) * head_dim**-0.5
        scores = scores.reshape(batch, groups, heads // groups, count, -1)
        seen = (lowest[..., None] <= index) & (index <= highest[..., None])
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        top = jnp.max(scores, axis=-1, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1)[..., None]
        weights = weights.astype(v.dtype).reshape(batch, groups, -1, weights.shape[-1])
        out = jnp.einsum(f"bkts,{keys}->bkth", weights, v, preferred_element_type=wide)
        out = out.reshape(batch, groups, heads // groups, count, head_dim) / jnp.where(total == 0, 1.0, total)
        return jnp.moveaxis(out, 3, 1).reshape(batch, count, heads, head_dim).astype(q.dtype)

    first = jnp.broadcast_to(first, (batch, length))
    last = jnp.broadcast_to(last, (batch, length))
    if length <= 2 * QUERY_BLOCK:
        return attend(q, first, last)

    padding = -length % QUERY_BLOCK

    def blocks(x: Array, fill: int) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, -1, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    # Added queries see the interval 1…0, which is empty.
    out = jax.lax.map(lambda block: jax.checkpoint(attend)(*block), (blocks(q, 0), blocks(first, 1), blocks(last, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, head_dim)[:, :length]


def causal_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], first: Int[Array, "#B T"]
) -> Float[Array, "B T N H"]:
    """``interval_attention`` of a whole text, where query t sees keys ``first[t] … t``."""
    length = q.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    first = jnp.broadcast_to(first, q.shape[:2])
    if target.current().platform == "cpu":
        return interval_attention(q, k, v, first, index) if length <= BLOCK else blockwise_attention(q, k, v, first)
    # Parts of less than 128 queries are too thin for a matmul to gain by what they spare.
    part = max(128, -(-length // CAUSAL_PARTS))
    return jnp.concatenate(
        [
            interval_attention(q[:, start:end], k[:, :end], v[:, :end], first[:, start:end], index[:, start:end])
            for start, end in ((at, min(at + part, length)) for at in range(0, length, part))
        ],
        axis=1,
    )


class SoftmaxMixer(nnx.Module):
    """Causal softmax attention of one layer; no parameters of its own.

    Keys and queries are rotated by their position in the document. A layer named by ``sliding_window_layers`` sees
    the last ``sliding_window`` tokens only. With ``dynamic`` RoPE the full forward reads the length of each document,
    and ``extend`` the length so far: keys already cached keep the rotation they arrived with, as in transformers, so
    the two agree up to the original context and differ beyond it.
    """

    def __init__(self, config: ModelConfig, layer_index: int):
        self.rope = config.rope
        self.kv_heads = config.kv_heads
        self.head_dim = config.head_dim
        slides = config.sliding_window_layers is None or layer_index in config.sliding_window_layers
        self.window = config.sliding_window if slides else None

    @shared
    def __call__(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T N H"]:
        heads = q.shape[2]
        q, k, v = for_devices(q, k, v)
        roles = (TOKENS, TOKENS, TOKENS, None if segment_ids is None else BATCH)
        spread = partition.spread(self._heads, roles, TOKENS, q.shape[0], (q.shape[2], k.shape[2]))
        return partition.heads_by_tokens(spread(q, k, v, segment_ids))[:, :, :heads]

    def _heads(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T N H"]:
        length = q.shape[1]
        index = jnp.arange(length, dtype=jnp.int32)[None]
        if segment_ids is None:
            positions, starts = index, jnp.zeros_like(index)
            inv_freq = inverse_frequencies(self.rope, self.head_dim, length=length)
        else:
            positions, starts = segment_positions(segment_ids), segment_starts(segment_ids)
            inv_freq = inverse_frequencies(self.rope, self.head_dim, length=segment_lengths(segment_ids))
        cos, sin = cos_sin(inv_freq, positions)
        keys = rotate(k, cos, sin)
        if flash.fits(q, keys):
            scale = flash.scale(self.head_dim)
            queries = rotate(q, scale * cos, scale * sin)
            if segment_ids is None:
                return flash.causal_attention(queries, keys, v, window=self.window)
            padding = segment_ids == 0
            # By starts, for two runs of one id are two documents.
            documents = jnp.where(padding, -1, starts)
            heads = flash.causal_attention(queries, keys, v, documents, window=self.window)
            return jnp.where(padding[..., None, None], 0, heads)
        first = starts if segment_ids is None else jnp.where(segment_ids == 0, index + 1, starts)
        if self.window is not None:
            first = jnp.maximum(first, index - (self.window - 1))
        return causal_attention(rotate(q, cos, sin), keys, v, first)

    def init_state(self, batch: int, max_length: int | None, dtype: DTypeLike) -> KVCache:
        """An empty cache.

        Raises:
            UserError: ``max_length`` is None; a cache that grows needs its size named beforehand.
        """
        if max_length is None:
            raise UserError("softmax attention keeps every token; init_state needs max_length, the most it may hold")
        return KVCache.empty(batch, max_length, self.kv_heads, self.head_dim, dtype)

    def extend(
        self,
        x: Float[Array, "B T D"],
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        state: KVCache,
        lengths: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T N H"], KVCache]:
        """Each row's first ``lengths`` tokens behind its cached ones; the rest are padding and give 0.

        Past the capacity it raises ``UserError`` where the position is known (see ``KVCache.append``); under
        ``jax.jit``, where it is not, every output of such a row is NaN.
        """
        place = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        positions = state.position[:, None] + place
        inv_freq = inverse_frequencies(self.rope, self.head_dim, length=(state.position + lengths)[:, None])
        cos, sin = cos_sin(inv_freq, positions)
        state, overflow = state.append(rotate(k, cos, sin), v, lengths)
        first = jnp.zeros_like(positions) if self.window is None else positions - (self.window - 1)
        first = jnp.where(place < lengths[:, None], first, positions + 1)
        heads = interval_attention(
            rotate(q, cos, sin), state.k.astype(q.dtype), state.v.astype(q.dtype), first, positions
        )
        return jnp.where(overflow[:, None, None, None], jnp.nan, heads), state
