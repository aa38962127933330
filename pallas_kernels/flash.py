"""Causal softmax over whole texts, no scores in memory: JAX's own flash kernel on TPUs, the window's kernels on GPUs.

What a decoder's softmax layers and the teacher of a run compute. The window of a student, with its sinks and its
memory, is ``sliding_window``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.dispatch import choose
from pallas_kernels.numerics import EMPTY
from pallas_kernels.sliding_window.problem import Problem

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

BLOCKS = (512, 256, 128)
"""On TPUs, queries of a block, and keys: the first that divides the text. By the compiler's schedule for a v5e blocks
of 1,024 would save a fifteenth of the forward pass at 2,048 tokens and nothing of the gradient."""
PARTS = 4
"""On GPUs, runs of queries that are called apart, each with a window up to the text's start: of all pairs of tokens
(1 + 1/PARTS)/2 are computed. Each compiles kernels of its own, once for all layers."""


def block_of(length: int) -> int | None:
    """Tokens of a block; None for a text that has no whole number of them."""
    return next((block for block in BLOCKS if length % block == 0), None)


def fits(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"]) -> bool:
    """Whether ``causal_attention`` computes this on the platform that is traced for.

    On GPUs in bf16 alone: Triton multiplies fp32 number by number, XLA in matrix units.
    """
    platform = target.current().platform
    if platform == "tpu":
        return q.dtype in (jnp.bfloat16, jnp.float32) and block_of(q.shape[1]) is not None
    return platform == "gpu" and q.dtype == jnp.bfloat16 and _window(q, k, q.shape[1]).kernel


def scale(head_dim: int) -> float:
    """What ``causal_attention`` wants queries multiplied by: ``1/√H`` where its kernel does not do that."""
    return head_dim**-0.5 if target.current().platform == "tpu" else 1.0


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """``softmax(q kᵀ/√H) v`` where a token sees those of its own document up to itself, the last ``window`` of them.

    Args:
        q: rotated, and multiplied by ``scale(H)``.
        k, v: of K key heads, rotated as well; N is a multiple of K.
        documents: two tokens see each other only if these are equal; -1 at the least.
        window: None for all of them.

    Returns:
        In the dtype of ``q``; scores and sums are float32.
    """
    kernel = _by_splash if target.current().platform == "tpu" else _by_windows
    return kernel(q, k, v, documents, window)


def _by_splash(q: Array, k: Array, v: Array, documents: Array | None, window: int | None) -> Array:
    # Slow to import, and not for every platform.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q.shape[1:3]
    block = block_of(length)
    assert block is not None
    seen = (length, length)
    mask = splash.CausalMask(seen) if window is None else splash.LocalMask(seen, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, interpret=target.current().interpret,
        block_sizes=splash.BlockSizes(
            block, block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
    )  # fmt: skip

    def row(q: Array, k: Array, v: Array, documents: Array | None) -> Any:
        segments = None if documents is None else splash.SegmentIds(documents, documents)
        return kernel(q, k, v, segment_ids=segments)

    q, k, v = (jnp.moveaxis(a, 2, 1) for a in (q, k, v))
    y = jax.vmap(row, in_axes=(0, 0, 0, None if documents is None else 0))(q, k, v, documents)
    return jnp.moveaxis(y, 1, 2)


def _by_windows(q: Array, k: Array, v: Array, documents: Array | None, window: int | None) -> Array:
    batch, length, heads = q.shape[:3]
    # The window's kernels take padding for segment 0, and what is put before a text is padding.
    segments = jnp.ones((batch, length), jnp.int32) if documents is None else documents.astype(jnp.int32) + 2
    none = jnp.full((heads,), EMPTY, jnp.float32)

    def part(start: int, end: int) -> Array:
        seen = min(end, window or end)
        first, before = max(0, start - seen), max(0, seen - start)
        keys, values, key_segments = (
            jnp.pad(x[:, first:end], [(0, 0), (before, 0)] + [(0, 0)] * (x.ndim - 2)) for x in (k, v, segments)
        )
        queries, own = q[:, start:end], segments[:, start:end]
        attend = _window(queries, keys, seen).attend
        return attend(queries, keys, values, own, key_segments, none, None, seen)[0]

    size = -(-length // PARTS)
    return jnp.concatenate([part(at, min(at + size, length)) for at in range(0, length, size)], axis=1)


def _window(q: Array, k: Array, window: int) -> Any:
    """What computes a window of so many tokens here."""
    (batch, time, heads, width), kv_heads = q.shape, k.shape[2]
    return choose("sliding_window", Problem(batch, time, heads, kv_heads, width, window, q.dtype, rope=False), None)
