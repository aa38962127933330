"""Causal softmax over whole texts on TPUs, by JAX's own flash kernel (splash attention): no scores in memory.

What a decoder's softmax layers and the teacher of a run compute. The window of a student, with its sinks and its
memory, is ``sliding_window``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels import target

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int

BLOCKS = (512, 256, 128)
"""Queries of a block, and keys: the first that divides the text. By the compiler's schedule for a v5e blocks of 1,024
would save a fifteenth of the forward pass at 2,048 tokens and nothing of the gradient."""


def block_of(length: int) -> int | None:
    """Tokens of a block; None for a text that has no whole number of them."""
    return next((block for block in BLOCKS if length % block == 0), None)


def fits(q: Float[Array, "B T N H"]) -> bool:
    """Whether ``causal_attention`` computes this on the platform that is traced for."""
    known = q.dtype in (jnp.bfloat16, jnp.float32)
    return target.current().platform == "tpu" and known and block_of(q.shape[1]) is not None


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    documents: Int[Array, "B T"] | None = None,
    *,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """``softmax(q kᵀ) v`` where a token sees those of its own document up to itself, the last ``window`` of them.

    Args:
        q: rotated, and multiplied by ``1/√H`` already.
        k, v: of K key heads, rotated as well; N is a multiple of K.
        documents: two tokens see each other only if these are equal.
        window: None for all of them.

    Returns:
        In the dtype of ``q``; scores and sums are float32.
    """
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
