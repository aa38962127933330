"""What decays inside a chunk and from it to the next state; never above 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.log_gate_attention.exponents import GRAIN
from pallas_kernels.log_gate_attention.pallas_gpu.chunk import places
from pallas_kernels.numerics import ABSENT, EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


class Exponents(NamedTuple):
    """Per place of a chunk; see ``exponents.Exponents``. What Triton lowers has no rounding, hence not that code."""

    coarse: Float[Array, " C"]
    rest: Float[Array, " C"]
    borders: Int[Array, " C"]
    hi: Float[Array, " C"]
    lo: Float[Array, " C"]


def _split(x: Float[Array, " C"]) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    coarse = jnp.floor(x * GRAIN + 0.5) * (1 / GRAIN)
    return coarse, x - coarse


def exponents_of(g: Float[Array, " C"], c: Float[Array, " C"]) -> Exponents:
    forgets, absent = g <= ABSENT, c <= ABSENT
    gate, gate_rest = _split(jnp.where(forgets, 0.0, g))
    scale, scale_rest = _split(jnp.where(absent, 0.0, c))
    coarse, rest = lax.cumsum(gate), lax.cumsum(gate_rest)
    borders = lax.cumsum(forgets.astype(jnp.int32))
    return Exponents(coarse, rest, borders, jnp.where(absent, EMPTY, scale - coarse), scale_rest - rest)


class Decay(NamedTuple):
    """What rows read of a chunk's keys and of the state it starts from, both relative to the rows' scales."""

    pair: Float[Array, "C C"]
    carried: Float[Array, " C"]
    nonempty: Bool[Array, " C"]
    m: Float[Array, " C"]


def decay_of(e: Exponents, m: Float[Array, ""]) -> Decay:
    place = places(e.hi.shape[0])
    there = (place[:, None] >= place[None, :]) & (e.borders[:, None] == e.borders[None, :])
    there &= (e.hi > ABSENT)[None, :]
    old = (e.borders == 0) & (m > ABSENT)
    M = jnp.maximum(jnp.max(jnp.where(there, e.hi[None, :], EMPTY), 1), jnp.where(old, m, EMPTY))
    exponent = (e.hi[None, :] - M[:, None]) + e.lo[None, :]
    pair = jnp.where(there, jnp.exp(jnp.where(there, exponent, 0.0)), 0.0)
    carried = jnp.where(old, jnp.exp(jnp.where(old, m - M, 0.0)), 0.0)
    nonempty = M > ABSENT
    return Decay(pair, carried, nonempty, jnp.where(nonempty, (M + e.coarse) + e.rest, EMPTY))


class Next(NamedTuple):
    """What the next state takes of each key and keeps of the last state, and its scale."""

    take: Float[Array, " C"]
    keep: Float[Array, ""]
    m: Float[Array, ""]


def next_of(e: Exponents, gate: Float[Array, " C"], m: Float[Array, ""]) -> Next:
    """The scale is rounded; what rounding took from it goes into the weights."""
    forgets = gate <= ABSENT
    coarse, rest = _split(jnp.where(forgets, 0.0, gate))
    past, past_rest, borders = jnp.sum(coarse), jnp.sum(rest), jnp.sum(forgets.astype(jnp.int32))
    there = (e.borders == borders) & (e.hi > ABSENT)
    old = (borders == 0) & (m > ABSENT)
    M = jnp.maximum(jnp.max(jnp.where(there, e.hi, EMPTY), 0), jnp.where(old, m, EMPTY))
    total = M + past
    lost = (M - (total - (total - M))) + (past - (total - M)) + past_rest
    take = jnp.where(there, jnp.exp(jnp.where(there, ((e.hi - M) + e.lo) + lost, 0.0)), 0.0)
    keep = jnp.where(old, jnp.exp(jnp.where(old, (m - M) + lost, 0.0)), 0.0)
    return Next(take, keep, jnp.where(M > ABSENT, total, EMPTY))


def unscale(x: Float[Array, "C H"], decay: Decay) -> Float[Array, "C H"]:
    """``x · e^m`` in two halves, so that only a result out of range overflows; 0 where there is no memory."""
    half = jnp.where(decay.nonempty, jnp.exp(0.5 * decay.m), 0.0)[:, None]
    return x * half * half
