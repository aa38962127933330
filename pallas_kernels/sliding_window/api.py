"""The only door to the window: one public op, many implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from pallas_kernels import partition
from pallas_kernels.dispatch import choose
from pallas_kernels.numerics import EMPTY, accumulator
from pallas_kernels.partition import BATCH, HEADS, TOKENS, WHOLE
from pallas_kernels.sliding_window import meta
from pallas_kernels.sliding_window.problem import Problem

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


def sliding_window(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B WT K H"],
    v: Float[Array, "B WT K H"],
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B WT"],
    *,
    window: int,
    rope_frequencies: Float[Array, " H/2"] | None = None,
    sink: Float[Array, " N"] | None = None,
    learned_k: Float[Array, "learned K H"] | None = None,
    learned_v: Float[Array, "learned K H"] | None = None,
    prefix_k: Float[Array, "B P M K H"] | None = None,
    prefix_v: Float[Array, "B P M K H"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Softmax of ``q·k/√H`` over each query's last W keys and its meta memory.

    Query i meets the keys i+1 … i+W of the key array, its own and the W-1 before it, where they are of its segment,
    and the meta memory. Query head ``n`` reads key/value head ``n // (N/K)``; keys and values are never repeated.

    Args:
        q: queries, ``[B, T, N, H]``, unrotated.
        k, v: the W tokens before the first query, then the T tokens of the queries, ``[B, W+T, K, H]``, unrotated
            and of the dtype of ``q``.
        q_segments, k_segments: ``[B, T]`` and ``[B, W+T]`` integers, not negative; 0 is padding and meets nothing.
        window: W, at least 1.
        rope_frequencies: the angle each pair of features ``(i, i + H/2)`` turns per position, ``[H/2]``, a constant to
            autodiff; None for no rotation. Angles come from positions inside a block, never absolute ones, so they are
            as exact at position 10⁶ as at 0.
        sink: ``[N]`` a logit per head that adds ``e^sink`` to the denominator and no value.
        learned_k, learned_v: ``[M, K, H]`` pairs every query meets, without rotation.
        prefix_k, prefix_v: ``[B, 1 or T, M, K, H]`` the first M tokens of each query's document, unrotated. A token
            still inside the window is counted there, once.
        positions: ``[B, T]`` of each query in its document, for the prefix.
        implementation: one of ``dispatch.IMPLEMENTATIONS``; ``None`` picks.

    Returns:
        ``y`` ``[B, T, N, H]`` in the dtype of ``v``, and the log-normalizer ``n`` ``[B, T, N]`` in fp32 (fp64 for fp64
        inputs) over the window, the sink and the meta tokens. Where a query meets nothing, and for padding, ``y`` is 0
        and ``n`` is -1e30.

    Raises:
        ValueError: an unknown implementation, a named one that cannot run, or shapes or dtypes that do not fit.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    if window < 1 or T < 1:
        raise ValueError(f"sliding_window: window is {window} and there are {T} queries; both must be at least 1")
    if N % K:
        raise ValueError(f"sliding_window: {N} query heads are not a multiple of {K} key/value heads")
    for name, x, shape in (
        ("k", k, (B, window + T, K, H)),
        ("v", v, (B, window + T, K, H)),
        ("q_segments", q_segments, (B, T)),
        ("k_segments", k_segments, (B, window + T)),
        ("rope_frequencies", rope_frequencies, (H // 2,)),
        ("sink", sink, (N,)),
        ("positions", positions, (B, T)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"sliding_window: {name} has shape {x.shape}, expected {shape}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"sliding_window: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; they must share a dtype")
    pairs = _pair("learned", learned_k, learned_v), _pair("prefix", prefix_k, prefix_v)
    if pairs[1] and positions is None:
        raise ValueError("sliding_window: prefix tokens need the positions of the queries")

    wide = accumulator(q.dtype)
    frequencies = None if rope_frequencies is None else lax.stop_gradient(rope_frequencies.astype(jnp.float32))
    logit = jnp.full((N,), EMPTY, wide) if sink is None else sink.astype(wide)
    chosen = choose("sliding_window", Problem(B, T, N, K, H, window, q.dtype, frequencies is not None), implementation)

    def attend(*arrays):
        return chosen.attend(*arrays, window)

    if chosen.kernel:
        roles = (TOKENS, TOKENS, TOKENS, BATCH, BATCH, HEADS, None if frequencies is None else WHOLE)
        attend = partition.spread(attend, roles, (TOKENS, TOKENS), B, (N, K))
    parts = [attend(q, k, v, q_segments.astype(jnp.int32), k_segments.astype(jnp.int32), logit, frequencies)]
    if pairs[0]:
        parts.append(meta.attend_learned(q, *pairs[0], q_segments))
    if pairs[1]:
        assert positions is not None
        parts.append(meta.attend_prefix(q, *pairs[1], q_segments, positions, frequencies, window))
    return parts[0] if len(parts) == 1 else meta.merge(parts, v.dtype)


def _pair(name: str, k: Array | None, v: Array | None) -> tuple[Array, Array] | None:
    if k is None and v is None:
        return None
    if k is None or v is None or k.shape != v.shape:
        raise ValueError(f"sliding_window: {name}_k and {name}_v come together and with one shape")
    return k, v
