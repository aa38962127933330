"""The op's arrays with their head axes split, so that no key or value is ever repeated.

``K`` key/value heads, ``P = S/K`` state heads in each, ``R = N/S`` query heads in each of those. ``C`` is the length of
a chunk, ``i`` a query's place in it and ``j`` a key's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax

from pallas_kernels.log_gate_attention.state import LinearState

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Tokens(NamedTuple):
    """Queries, keys, values, gates and key scales of one chunk, all in the accumulators' dtype."""

    q: Float[Array, "B C K P R F"]
    k: Float[Array, "B C K P F"]
    v: Float[Array, "B C K H"]
    g: Float[Array, "B C K P"] | Float[Array, "B C K P F"]
    c: Float[Array, "B C K P"]


def group(q, k, v, g, c) -> Tokens:
    """Split the head axes of the op's arguments, cut to one chunk.

    A chunk and not the whole sequence: XLA gives the split arrays a layout of its own, which for the sequence would be
    a copy of it.
    """
    B, C, N, F = q.shape
    S, K = k.shape[2], v.shape[2]
    P, R = S // K, N // S
    shapes = ((B, C, K, P, R, F), (B, C, K, P, F), v.shape, (B, C, K, P, *g.shape[3:]), (B, C, K, P))
    return Tokens(*(x.reshape(shape).astype(g.dtype) for x, shape in zip((q, k, v, g, c), shapes, strict=True)))


def group_state(state: LinearState, K: int) -> LinearState:
    """``[B, S, …]`` to ``[B, K, P, …]``."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], K, x.shape[1] // K, *x.shape[2:]), state)


def ungroup_state(state: LinearState) -> LinearState:
    """``[B, K, P, …]`` to ``[B, S, …]``."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), state)
