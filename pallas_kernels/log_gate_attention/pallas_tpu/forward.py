"""The forward kernel, and the one that computes nothing but the state before each chunk."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.log_gate_attention.pallas_tpu.chunk import Chunk, advance, begin, inputs, inverse, state_shapes
from pallas_kernels.log_gate_attention.pallas_tpu.decay import Decay, decays
from pallas_kernels.log_gate_attention.pallas_tpu.features import Features
from pallas_kernels.log_gate_attention.pallas_tpu.layout import Blocks, Plan, call
from pallas_kernels.log_gate_attention.pallas_tpu.matmul import Stack, dot, stack
from pallas_kernels.log_gate_attention.pallas_tpu.rows import stacked
from pallas_kernels.log_gate_attention.state import SMALLEST
from pallas_kernels.numerics import EMPTY
from pallas_kernels.staggered import staggered

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class _Held(NamedTuple):
    """What all query heads of a state head meet."""

    decay: Decay
    with_q: Stack  # keys, kv transposed, z
    values: Float[Array, "H C"]


class _Read(NamedTuple):
    """What a query head has met."""

    num: Float[Array, "H C"]  # of the chunk
    reads_kv: Float[Array, "H C"]
    den: Float[Array, "1 C"]
    log_scale: Float[Array, "1 C"] | None


def _read(held: _Held, q: Features, met: Array) -> _Read:
    scores, reads_kv, reads_z = held.with_q.split(met)
    weights = scores * held.decay.pair
    num = dot(held.values, weights.astype(held.values.dtype))
    den = jnp.sum(weights, 0, keepdims=True) + held.decay.carried * reads_z[:1]
    return _Read(num, reads_kv, den, q.log_scale)


def _output(decay: Decay, read: _Read, normalize: bool) -> tuple[Float[Array, "H C"], Float[Array, "1 C"]]:
    """Output, transposed, and log normalizer."""
    num, den = read.num + decay.carried * read.reads_kv, read.den
    if normalize:
        y = num * inverse(den)
    else:
        half = jnp.exp(0.5 * decay.level)
        y = num * half * half
    n = decay.level + jnp.log(jnp.where(den > SMALLEST, den, 1.0))
    n = n if read.log_scale is None else n + read.log_scale
    return y, jnp.where(den > SMALLEST, n, EMPTY)


def log_gate_forward(plan: Plan, ins: dict, outs: dict, state: dict) -> None:
    """``y`` and ``n`` of a chunk; at the last one the final state."""
    i, turn = pl.program_id(2), pl.program_id(3)
    begin(plan, ins, state)
    chunks = [Chunk(plan, ins, i, head) for head in range(plan.M)]
    held, before = [], []
    for chunk in chunks:
        key, v, kv, z = chunk.key(), chunk.values(), state["kv"][chunk.place], state["z"][chunk.place]
        decay = decays(chunk.gates(), chunk.key_scales(key), state["m"][chunk.place])
        with_q = stack(plan.dtype, (key.rows, 1), (kv.astype(plan.dtype).T, 1), (stacked(z), 3))
        held.append(_Held(decay, with_q, v.T))
        before.append((key, v, kv, z))

    def query(place: int) -> Features:
        return chunks[place // plan.R].query(place % plan.R)

    def meet(place: int, q: Features) -> tuple[Features, Array]:
        return q, q.met_by(held[place // plan.R].with_q.value)

    def read(place: int, met: tuple[Features, Array]) -> _Read:
        return _read(held[place // plan.R], *met)

    def write(place: int, read: _Read) -> None:
        y, n = _output(held[place // plan.R].decay, read, plan.normalize)
        outs["y"][0, :, place * plan.H : (place + 1) * plan.H] = y.astype(plan.dtype).T
        outs["n"][0, place, 0] = n

    staggered(plan.M * plan.R, query, meet, read, write)
    after = [advance(of_head.decay, *of_state) for of_head, of_state in zip(held, before, strict=True)]
    for chunk, of_head, (kv, z) in zip(chunks, held, after, strict=True):
        state["kv"][chunk.place], state["z"][chunk.place], state["m"][chunk.place] = kv, z, of_head.decay.m

    @pl.when(i == plan.chunks - 1)
    def _() -> None:
        for name, ref in state.items():
            outs[name][0] = ref[pl.ds(turn * plan.M, plan.M)]


def log_gate_states(plan: Plan, ins: dict, outs: dict, state: dict) -> None:
    """The state before a chunk.

    Heads go through it side by side and are written last: each alone is a chain of operations that wait for each other.
    """
    begin(plan, ins, state)
    chunks = [Chunk(plan, ins, pl.program_id(2), head) for head in range(plan.M)]
    before = [{name: ref[chunk.place] for name, ref in state.items()} for chunk in chunks]
    keys = [chunk.key() for chunk in chunks]
    decayed = [
        decays(chunk.gates(), chunk.key_scales(key), held["m"])
        for chunk, key, held in zip(chunks, keys, before, strict=True)
    ]
    after = [
        advance(decay, key, chunk.values(), held["kv"], held["z"], finely=True)
        for chunk, key, decay, held in zip(chunks, keys, decayed, before, strict=True)
    ]
    for chunk, decay, held, (kv, z) in zip(chunks, decayed, before, after, strict=True):
        for name, x in held.items():
            outs[name][0, chunk.head, 0] = x
        state["kv"][chunk.place], state["z"][chunk.place], state["m"][chunk.place] = kv, z, decay.m


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
        {"y": blocks.of_state_heads(plan.R * plan.H), "n": blocks.rows(plan.R)}
        | {name: blocks.at_end(*shape) for name, shape in shapes.items()},
        {name: (plan.turns * plan.M, *shape) for name, shape in shapes.items()},
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
        {name: (plan.turns * plan.M, *shape) for name, shape in shapes.items()},
    )
