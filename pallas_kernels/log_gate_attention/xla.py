"""Chunked attention in plain XLA: matmuls inside a chunk, a scan over chunks that carries the state.

Linear in T in time and memory. The backward pass keeps the inputs and the state at the start of each chunk, and
computes everything else again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.log_gate_attention import scalar_chunk, vector_chunk
from pallas_kernels.log_gate_attention.features import from_raw
from pallas_kernels.log_gate_attention.grouped import group, group_state, ungroup_state
from pallas_kernels.log_gate_attention.problem import Implementation
from pallas_kernels.log_gate_attention.state import LinearState

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def _over_chunks(body: Callable, carry: Any, T: int, chunk: int, reverse: bool = False) -> Any:
    """Fold ``body(carry, index, start, length)`` over the chunks of ``range(T)``; the last may be shorter."""
    whole, rest = divmod(T, chunk)
    if rest and reverse:
        carry = body(carry, whole, whole * chunk, rest)
    if whole:
        carry, _ = lax.scan(
            lambda carry, i: (body(carry, i, i * chunk, chunk), None), carry, jnp.arange(whole), reverse=reverse
        )
    if rest and not reverse:
        carry = body(carry, whole, whole * chunk, rest)
    return carry


def _cut(x: Array, start, length: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, length, axis=1)


def _put(buffer: Array, part: Array, start) -> Array:
    part = part.reshape(*part.shape[:2], *buffer.shape[2:]).astype(buffer.dtype)
    return lax.dynamic_update_slice_in_dim(buffer, part, start, axis=1)


def _kernel(g: Array):
    return vector_chunk if g.ndim == 4 else scalar_chunk


def _precision(q: Array) -> lax.Precision:
    """Half-precision inputs are exact in one pass of a matrix unit; fp32 ones need all of its passes."""
    return lax.Precision.HIGHEST if q.dtype.itemsize >= 4 else lax.Precision.DEFAULT


def _run(q, k, v, g, c, state: LinearState, normalize: bool, chunk: int, keep_states: bool):
    """``(y, n, final state)`` and, where asked for, the state before each chunk, stacked in front."""
    (B, T, N, _), (K, H) = q.shape, v.shape[2:]
    kernel, precision, state = _kernel(g), _precision(q), group_state(state, K)
    count = -(-T // chunk) if keep_states else 0
    starts = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), state)
    y, n = jnp.zeros((B, T, N, H), v.dtype), jnp.zeros((B, T, N), g.dtype)

    def body(carry, index, start, length):
        y, n, state, starts = carry
        if keep_states:
            starts = jax.tree.map(lambda all, one: lax.dynamic_update_index_in_dim(all, one, index, 0), starts, state)
        tokens = group(*(_cut(x, start, length) for x in (q, k, v, g, c)))
        part, part_n, state = kernel.forward(tokens, state, normalize, precision)
        return _put(y, part, start), _put(n, part_n, start), state, starts

    y, n, state, starts = _over_chunks(body, (y, n, state, starts), T, chunk)
    return (y, n, ungroup_state(state)), starts


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B T S F"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"] | Float[Array, "B T S F"],
    c: Float[Array, "B T S"],
    state: LinearState,
    normalize: bool,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """Chunked forward pass; its gradient is taken chunk by chunk, from the last to the first."""
    return _run(q, k, v, g, c, state, normalize, chunk, keep_states=False)[0]


def _attend_fwd(q, k, v, g, c, state, normalize, chunk):
    out, starts = _run(q, k, v, g, c, state, normalize, chunk, keep_states=True)
    return out, (q, k, v, g, c, starts)


def _attend_bwd(normalize, chunk, saved, cotangents):
    q, k, v, g, c, starts = saved
    dy, dn, dstate = cotangents
    T, K = q.shape[1], v.shape[2]
    kernel, precision, dstate = _kernel(g), _precision(q), group_state(dstate, K)

    def body(carry, index, start, length):
        grads, dkv, dz = carry
        state = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), starts)
        tokens = group(*(_cut(x, start, length) for x in (q, k, v, g, c)))
        part_dy, part_dn = _cut(dy, start, length).astype(g.dtype), _cut(dn, start, length)
        rows = tokens.q.shape[:-1]
        *parts, dkv, dz = kernel.backward(
            tokens, state, part_dy.reshape(*rows, -1), part_dn.reshape(rows), dkv, dz, normalize, precision
        )
        return tuple(_put(grad, part, start) for grad, part in zip(grads, parts, strict=True)), dkv, dz

    grads = tuple(jnp.zeros(x.shape, x.dtype) for x in (q, k, v, g, c))
    grads, dkv, dz = _over_chunks(body, (grads, dstate.kv, dstate.z), T, chunk, reverse=True)
    return *grads, ungroup_state(LinearState(dkv, dz, jnp.zeros_like(dstate.m)))


attend.defvjp(_attend_fwd, _attend_bwd)


IMPLEMENTATION = Implementation(attend, from_raw(attend), lambda problem, target: None, kernel=False)
