"""Chunked attention as Pallas kernels for GPUs, compiled by Triton; nothing but JAX is needed.

Six kernels. ``C`` is the length of a chunk, ``R = N/S`` the query heads of a state head, and a state is cut over ``H``
where it does not fit the registers of one block.

- forward: one program per sequence, state head and cut of ``H``; the state stays in registers from chunk to chunk.
- states, the backward pass' first: the same without reading; leaves the state at each chunk's start.
- queries: cotangents of a chunk's queries, and ``a`` and ``b`` of its rows (a pair's weight has the cotangent
  ``a_i (dy_i·v_j) + b_i``). Chunks are independent, here and in the last two kernels.
- state cotangents: from the last chunk to the first; leaves the cotangent of the state at each chunk's end.
- keys and values: cotangents of a chunk's keys; and of its values, gates and key scales.

Cotangents of gates and scales are sums of what nearly cancels: states and their cotangents stay fp32, and where bf16
would round them they enter matmuls with what rounding takes. A feature axis comes in ``parts``: the two halves of a
feature map, or pieces of at most 64 features. Axes that are not powers of two are padded with zeros, outside of the
kernels; a tail of ``T`` is masked inside.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.limits import PALLAS_GPU
from pallas_kernels.log_gate_attention.pallas_gpu.backward import backward
from pallas_kernels.log_gate_attention.pallas_gpu.forward import forward
from pallas_kernels.log_gate_attention.pallas_gpu.plan import CHUNK, MAPPED_CHUNK, PIECE, Plan
from pallas_kernels.log_gate_attention.problem import Act, Implementation, Problem
from pallas_kernels.log_gate_attention.state import LinearState
from pallas_kernels.pallas_triton import power_of_two

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, g, c, state: LinearState, maps):
    return forward(plan, q, k, v, g, c, state, maps)[0]


def _attend_fwd(plan: Plan, q, k, v, g, c, state: LinearState, maps):
    out, c = forward(plan, q, k, v, g, c, state, maps)
    return out, (q, k, v, g, c, state, maps)


_attend.defvjp(_attend_fwd, backward)


def pad(x: Array, **sizes: int) -> Array:
    """Zeros appended to axes, named ``a0``, ``a1``, …, up to a size."""
    widths = [(0, sizes.get(f"a{axis}", length) - length) for axis, length in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _padded(q, k, v, g, c, state: LinearState, maps, act: Act | None, normalize: bool, chunk: int):
    """Pad, attend, and cut the padding off."""
    (B, T, N, _), (K, H) = q.shape, v.shape[2:]
    S, F = state.z.shape[1:]
    halves = 1 if act is None else 2
    half = F // halves
    width = min(power_of_two(half), PIECE) if act is None else power_of_two(half)
    parts = halves * (power_of_two(half) // width)
    wide_H, wide_X = power_of_two(H), power_of_two(q.shape[-1])
    C = MAPPED_CHUNK if act or min(chunk, T) <= 16 else CHUNK
    plan = Plan(
        B, T, N, S, K, wide_H, C, parts, width, 0 if act is None else half, wide_X, act, normalize, q.dtype,
        target.current().interpret,
    )  # fmt: skip

    def to_parts(x: Array) -> Array:
        x = pad(x.reshape(B, S, halves, half, *x.shape[3:]), a3=parts * width // halves)
        return x.reshape(B, S, parts, width, *x.shape[4:])

    def from_parts(x: Array) -> Array:
        x = x.reshape(B, S, halves, parts * width // halves, *x.shape[4:])
        return x[:, :, :, :half].reshape(B, S, F, *x.shape[4:])

    q, k, v = pad(q, a3=wide_X), pad(k, a3=wide_X), pad(v, a3=wide_H)
    maps = tuple(pad(x, a1=wide_X, a2=width) for x in maps)
    before = LinearState(jnp.swapaxes(to_parts(pad(state.kv, a3=wide_H)), -1, -2), to_parts(state.z), state.m)
    attended: Any = _attend(plan, q, k, v, g, c, before, maps)
    y, n, after = attended
    return y[..., :H], n, LinearState(from_parts(jnp.swapaxes(after.kv, -1, -2))[..., :H], from_parts(after.z), after.m)


def attend(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B T S F"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: LinearState,
    normalize: bool,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """The op from given features; arguments as ``problem.Implementation`` says, ``q``, ``k`` and ``v`` of one dtype."""
    return _padded(q, k, v, g, c, state, (), None, normalize, chunk)


def attend_mapped(
    q: Float[Array, "B T N X"],
    k: Float[Array, "B T K X"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: LinearState,
    q_map: Float[Array, "N X half"],
    k_map: Float[Array, "S X half"],
    act: Act,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """The op from raw queries and keys; every kernel computes the features it needs."""
    return _padded(q, k, v, g, c, state, (q_map, k_map), act, True, chunk)


def cannot_run(problem: Problem, device: target.Target) -> str | None:
    """Why these kernels cannot compute a problem on a target, in one line; None where they can."""
    sizes = {"F": problem.F, "H": problem.H, "X": problem.width}
    return PALLAS_GPU.refusal(device, problem.dtype, vector_gates=problem.vector_gates, **sizes)


IMPLEMENTATION = Implementation(attend, attend_mapped, cannot_run)
