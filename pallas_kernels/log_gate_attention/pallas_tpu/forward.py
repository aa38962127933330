"""The forward kernel, and the one that computes nothing but the state before each chunk."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.log_gate_attention.pallas_tpu.chunk import Chunk, advance, inputs, inverse, state_shapes
from pallas_kernels.log_gate_attention.pallas_tpu.decay import Decay, decays, row
from pallas_kernels.log_gate_attention.pallas_tpu.features import Features, dot
from pallas_kernels.log_gate_attention.pallas_tpu.layout import Blocks, Plan, call
from pallas_kernels.log_gate_attention.state import EMPTY, SMALLEST

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def _read(
    decay: Decay,
    level: Float[Array, "1 C"],
    q: Features,
    k: Float[Array, "C F"],
    v: Float[Array, "C H"],
    kv: Float[Array, "F H"],
    z: Float[Array, "1 F"],
    normalize: bool,
) -> tuple[Float[Array, "C H"], Float[Array, "1 C"]]:
    """Output and log normalizer of one query head; ``kv`` is rounded to the inputs' dtype, ``level`` is ``decay``'s.

    A column fills 16 registers where a row fills one, so logarithms are taken of rows.
    """
    weights = dot(q.value, k, (1, 1)) * decay.pair
    num = dot(weights.astype(v.dtype), v) + decay.carried * dot(q.value, kv)
    reads_z = jnp.sum(q.value.astype(jnp.float32) * z, 1, keepdims=True)
    den = jnp.sum(weights, 1, keepdims=True) + decay.carried * reads_z
    if normalize:
        y = num * inverse(den)
    else:
        half = jnp.exp(0.5 * decay.level)
        y = num * half * half
    den = row(den)
    n = level + jnp.log(jnp.where(den > SMALLEST, den, 1.0))
    n = n if q.log_scale is None else n + row(q.log_scale)
    return y, jnp.where(den > SMALLEST, n, EMPTY)


def log_gate_forward(plan: Plan, ins: dict, outs: dict, state: dict) -> None:
    """``y`` and ``n`` of a chunk; at the last one the final state."""
    i, p = pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _() -> None:
        for name, ref in state.items():
            ref[p] = ins[name][0, 0]

    chunk = Chunk(plan, ins, i)
    key, v = chunk.key(), chunk.rows("v")
    decay = decays(chunk.gates(), chunk.key_scales(key), state["m"][p])
    kv, z = state["kv"][p], state["z"][p]
    rounded, level = kv.astype(plan.dtype), row(decay.level)
    for head in range(plan.R):
        y, n = _read(decay, level, chunk.query(head), key.value, v, rounded, z, plan.normalize)
        outs["y"][0, :, head * plan.H : (head + 1) * plan.H] = y.astype(plan.dtype)
        outs["n"][0, head, 0] = n
    state["kv"][p], state["z"][p] = advance(decay, key.value, v, kv, z)
    state["m"][p] = decay.m

    @pl.when(i == plan.chunks - 1)
    def _() -> None:
        for name, ref in state.items():
            outs[name][0, 0] = ref[p]


def log_gate_states(plan: Plan, ins: dict, outs: dict, state: dict) -> None:
    """The state before a chunk."""
    i, p = pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _() -> None:
        for name, ref in state.items():
            ref[p] = ins[name][0, 0]

    for name, ref in state.items():
        outs[name][0, 0, 0] = ref[p]

    chunk = Chunk(plan, ins, i)
    key = chunk.key()
    decay = decays(chunk.gates(), chunk.key_scales(key), state["m"][p])
    before = state["kv"][p], state["z"][p]
    state["kv"][p], state["z"][p] = advance(decay, key.value, chunk.rows("v"), *before, finely=True)
    state["m"][p] = decay.m


def forward(plan: Plan, arrays: dict[str, Array]) -> dict[str, Array]:
    """``y [B, T, N·H]``, rows ``n``, and the final state: ``kv [B, S, F, H]``, ``z [B, S, 1, F]``, ``m [B, S, 1, 1]``.

    ``arrays`` are the inputs in the layout of ``layout``: q, k, v, g, c, the state, and the two maps if there are any.
    """
    blocks, shapes = Blocks(plan), state_shapes(plan)
    outputs = {
        "y": plan.shape(plan.B, plan.T, plan.N * plan.H, dtype=plan.dtype),
        "n": plan.shape(plan.B, plan.N, plan.chunks, 1, plan.C),
    }
    return call(
        plan,
        functools.partial(log_gate_forward, plan),
        arrays,
        inputs(plan, blocks) | {name: blocks.at_start(*shape) for name, shape in shapes.items()},
        outputs | {name: plan.shape(plan.B, plan.S, *shape) for name, shape in shapes.items()},
        {"y": blocks.of_state_head(plan.R * plan.H), "n": blocks.row(plan.R)}
        | {name: blocks.at_end(*shape) for name, shape in shapes.items()},
        {name: (plan.P, *shape) for name, shape in shapes.items()},
    )


def states(plan: Plan, arrays: dict[str, Array]) -> dict[str, Array]:
    """The state before each chunk: ``kv [B, S, chunks, F, H]``, ``z [B, S, chunks, 1, F]``, ``m``, all fp32."""
    blocks, shapes = Blocks(plan), state_shapes(plan)
    return call(
        plan,
        functools.partial(log_gate_states, plan),
        {name: x for name, x in arrays.items() if name not in ("q", "q_map")},
        inputs(plan, blocks) | {name: blocks.at_start(*shape) for name, shape in shapes.items()},
        {name: plan.shape(plan.B, plan.S, plan.chunks, *shape) for name, shape in shapes.items()},
        {name: blocks.each_chunk(*shape) for name, shape in shapes.items()},
        {name: (plan.P, *shape) for name, shape in shapes.items()},
    )
