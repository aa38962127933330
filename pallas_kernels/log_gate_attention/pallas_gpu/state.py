"""A state in registers: loaded, stored, and moved past a chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from pallas_kernels.log_gate_attention.pallas_gpu.decay import Next
from pallas_kernels.log_gate_attention.pallas_gpu.matmul import dot_wide
from pallas_kernels.log_gate_attention.pallas_gpu.plan import Plan

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class State(NamedTuple):
    """A cut of a state, in registers: parts of ``kv``, transposed, and of ``z``, and the scale."""

    kv: tuple[Float[Array, "block width"], ...]
    z: tuple[Float[Array, " width"], ...]
    m: Float[Array, ""]


def load_parts(ref, plan: Plan, *index) -> tuple[Array, ...]:
    return tuple(ref[(*index[:-1], p, *index[-1])] for p in range(plan.parts))


def store_parts(ref, values, *index) -> None:
    for p, value in enumerate(values):
        ref[(*index[:-1], p, *index[-1])] = value.astype(ref.dtype)


def load_state(kv_ref, z_ref, m_ref, plan: Plan, columns, *index) -> State:
    return State(
        load_parts(kv_ref, plan, *index, (columns, slice(None))),
        load_parts(z_ref, plan, *index, (slice(None),)),
        m_ref[index],
    )


def store_state(refs, state: State, columns, *index) -> None:
    kv_ref, z_ref, m_ref = refs
    store_parts(kv_ref, state.kv, *index, (columns, slice(None)))
    store_parts(z_ref, state.z, *index, (slice(None),))
    m_ref[index] = state.m


def advance(state: State, k, v: Float[Array, "C block"], following: Next) -> State:
    """The state after the chunk."""
    kvs, zs = [], []
    for kv, z, part in zip(state.kv, state.z, k, strict=True):
        taken = following.take[:, None] * part.astype(jnp.float32)
        kvs.append(following.keep * kv + dot_wide(v, taken, (0, 0)))
        zs.append(following.keep * z + jnp.sum(taken, 0))
    return State(tuple(kvs), tuple(zs), following.m)
