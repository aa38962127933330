"""Sums of log gates whose differences are exact.

Weights are ``e^(g_{j+1} + … + g_i + c_j)``. As the difference of two running sums in fp32 such an exponent misses by
1e-4 when gates near 1 stand beside hard forgets, for its sums are in the thousands. So each number is split at 2^-7.
The coarse parts are multiples of it, small enough that fp32 adds and subtracts them without rounding, in any order and
on any hardware; the rests sum to less than 1. Gates that forget everything count as borders, not as numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import ABSENT, EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

FORGET = -500.0  # a log gate at or below this forgets everything
GRAIN = 128  # coarse parts are multiples of 1/GRAIN; FORGET · GRAIN · 256 tokens < 2^24 keeps their sums exact


class Exponents(NamedTuple):
    """Of one chunk, per place. A pair's exponent relative to a scale ``M`` is ``(hi_j - M) + lo_j``, plus
    ``coarse_i + rest_i`` where it is wanted in itself."""

    coarse: Float[Array, "... C"]  # Σ_{t ≤ i} of the gates' coarse parts
    rest: Float[Array, "... C"]  # and of their rests
    borders: Int[Array, "... C"]  # gates up to here that forget everything: a pair counts only where these are equal
    hi: Float[Array, "... C"]  # coarse part of c_j, less coarse_j; -1e30 for an absent key
    lo: Float[Array, "... C"]  # rest of c_j, less rest_j


def split(x: Float[Array, "*any"]) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """A number as a multiple of 1/GRAIN, constant to autodiff, and the rest."""
    coarse = jax.lax.stop_gradient(jnp.round(x * GRAIN) / GRAIN)
    return coarse, x - coarse


def exponents(g: Float[Array, "... C"], c: Float[Array, "... C"]) -> Exponents:
    """Running sums of a chunk's log gates ``g`` and key scales ``c``, each prepared by the door."""
    forgets, absent = g <= ABSENT, c <= ABSENT
    gate, gate_rest = split(jnp.where(forgets, 0.0, g))
    scale, scale_rest = split(jnp.where(absent, 0.0, c))
    coarse, rest = jnp.cumsum(gate, -1), jnp.cumsum(gate_rest, -1)
    return Exponents(
        coarse, rest, jnp.cumsum(forgets.astype(jnp.int32), -1),
        jnp.where(absent, EMPTY, scale - coarse), scale_rest - rest,
    )  # fmt: skip
