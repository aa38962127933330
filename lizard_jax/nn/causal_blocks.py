"""Causal softmax in blocks of queries and of keys, forward and backward: a CPU's caches hold the scores of a block.

The running maximum and total of flash attention, in plain JAX: a block of queries goes over the blocks of keys that it
sees, and over no others. What the backward pass needs of the scores it computes again.
"""

import jax
import jax.numpy as jnp

from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.typing import Array, Float, Int
from pallas_kernels.numerics import ABSENT, EMPTY

BLOCK = 256
"""Queries of a block, and keys."""


@jax.custom_vjp
def blockwise_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], first: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """``softmax(q kᵀ/√H) v`` where query t sees keys ``first[t] … t``; 0 where that is none.

    Everything inside is float32 (float64 for such inputs); the result is in the dtype of ``q``, gradients in those of
    their inputs. Not differentiable in forward mode.
    """
    return _forward(q, k, v, first)[0]


def _forward(q: Array, k: Array, v: Array, first: Array) -> tuple[Array, tuple[Array, ...]]:
    block, queries, keys, values, starts = _cut(q, k, v, first)
    # A column of ones: the weights' total comes out of the product with the values.
    values = jnp.concatenate([values, jnp.ones((*values.shape[:-1], 1), values.dtype)], axis=-1)

    def attend(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        at, own, since = part

        def meet(j: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
            top, total = so_far
            scores = _scores(own, _block(keys, j, block), at, j, since)
            above = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            # Before a query has met a key this sums what it does not see; the first score it meets takes that to 0.
            return above, total * jnp.exp(top - above) + jnp.exp(scores - above) @ _block(values, j, block)

        rows = own.shape[:-1]
        nothing = jnp.full((*rows, 1), EMPTY, own.dtype), jnp.zeros((*rows, values.shape[-1]), own.dtype)
        top, total = jax.lax.fori_loop(_lowest(since, block), at + 1, meet, nothing)
        met, weight = top > ABSENT, total[..., -1:]
        return jnp.where(met, total[..., :-1] / weight, 0.0), jnp.where(met, top + jnp.log(weight), 0.0)

    heads, normalizers = jax.lax.map(attend, (jnp.arange(queries.shape[0], dtype=jnp.int32), queries, starts))
    y = _joined(heads, q)
    return y, (q, k, v, first, y, normalizers)


def _backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, first, y, normalizers = saved
    block, queries, keys, values, starts = _cut(q, k, v, first)
    wide = keys.dtype
    gradients = _queries(dy.astype(wide), k.shape[2], block)
    shares = _queries(jnp.sum(dy.astype(wide) * y.astype(wide), axis=-1, keepdims=True), k.shape[2], block)

    def attend(sums: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        at, own, since, normalizer, gradient, share = part

        def meet(j: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_own, d_keys, d_values = so_far
            key, value = _block(keys, j, block), _block(values, j, block)
            weights = jnp.exp(_scores(own, key, at, j, since) - normalizer)
            d_scores = weights * (gradient @ value.swapaxes(-1, -2) - share)
            d_keys = _added(d_keys, d_scores.swapaxes(-1, -2) @ own, j, block)
            d_values = _added(d_values, weights.swapaxes(-1, -2) @ gradient, j, block)
            return d_own + d_scores @ key, d_keys, d_values

        none = jnp.zeros_like(own)
        d_own, d_keys, d_values = jax.lax.fori_loop(_lowest(since, block), at + 1, meet, (none, *sums))
        return (d_keys, d_values), d_own

    parts = jnp.arange(queries.shape[0], dtype=jnp.int32), queries, starts, normalizers, gradients, shares
    (d_keys, d_values), d_queries = jax.lax.scan(attend, (jnp.zeros_like(keys), jnp.zeros_like(values)), parts)
    dq = _joined(d_queries * q.shape[-1] ** -0.5, q)
    dk, dv = (jnp.moveaxis(d, 1, 2)[:, : like.shape[1]].astype(like.dtype) for d, like in ((d_keys, k), (d_values, v)))
    return dq, dk, dv, None


blockwise_attention.defvjp(_forward, _backward)


def _cut(q: Array, k: Array, v: Array, first: Array) -> tuple[int, Array, Array, Array, Array]:
    """The block's size; scaled queries ``[blocks, B, K, G·block, H]``; keys and values ``[B, K, T, H]``, filled up to
    whole blocks; and where each query's keys begin ``[blocks, B, block]``. Queries that were added see nothing."""
    length, wide = q.shape[1], accumulation_dtype(q)
    block = min(BLOCK, length)
    extra = -length % block
    keys, values = (jnp.pad(jnp.moveaxis(x.astype(wide), 1, 2), [(0, 0), (0, 0), (0, extra), (0, 0)]) for x in (k, v))
    starts = jnp.pad(first, [(0, 0), (0, extra)], constant_values=length + extra)
    starts = jnp.moveaxis(starts.reshape(len(q), -1, block), 1, 0)
    return block, _queries(q.astype(wide) * q.shape[-1] ** -0.5, k.shape[2], block), keys, values, starts


def _queries(x: Array, kv_heads: int, block: int) -> Array:
    """``[B, T, N, …]`` as blocks, the query heads of a key head below each other: ``[blocks, B, K, G·block, …]``."""
    batch, length, heads, width = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % block), (0, 0), (0, 0)])
    x = x.reshape(batch, -1, block, kv_heads, heads // kv_heads, width).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, width)


def _joined(blocks: Array, like: Array) -> Array:
    """What ``_queries`` made, back in the shape and dtype of the queries."""
    batch, length, heads, width = like.shape
    count, _, kv_heads = blocks.shape[:3]
    x = blocks.reshape(count, batch, kv_heads, heads // kv_heads, -1, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, heads, width)[:, :length].astype(like.dtype)


def _block(x: Array, j: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, j * block, block, axis=2)


def _added(sums: Array, x: Array, j: Array, block: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(sums, _block(sums, j, block) + x, j * block, axis=2)


def _lowest(since: Array, block: int) -> Array:
    """The first block of keys that any query of a block sees."""
    return jnp.min(since) // block


def _scores(own: Array, keys: Array, at: Array, j: Array, since: Array) -> Array:
    """Of a block of queries with a block of keys ``[B, K, G·block, block]``; ``EMPTY`` where a key is not seen."""
    block = since.shape[-1]
    place = jnp.arange(block, dtype=jnp.int32)
    index = j * block + place
    seen = (since[..., None] <= index) & (index <= (at * block + place)[:, None])
    scores = (own @ keys.swapaxes(-1, -2)).reshape(*own.shape[:2], -1, block, block)
    return jnp.where(seen[:, None, None], scores, EMPTY).reshape(*own.shape[:2], -1, block)
