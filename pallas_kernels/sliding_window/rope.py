"""Rotation by position: pairs of features half a head apart turn by angles proportional to their position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import accumulator

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


def tables(
    frequencies: Float[Array, " H/2"], positions: Int[Array, "*L"]
) -> tuple[Float[Array, "*L H/2"], Float[Array, "*L H/2"]]:
    """``cos(p f)`` and ``sin(p f)`` of every position and frequency, in the dtype of the frequencies.

    An fp32 product of hundreds would miss by 1e-5, so the angle is a sum of parts, by parts of the frequency of eight
    bits: exact for positions below 65,536.
    """
    at = positions[..., None].astype(frequencies.dtype)
    cos, sin = jnp.ones_like(at * frequencies), jnp.zeros_like(at * frequencies)
    rest = frequencies
    for last in (False, False, True):
        part = rest if last else lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        rest = rest - part
        turn_cos, turn_sin = jnp.cos(at * part), jnp.sin(at * part)
        cos, sin = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin
    return cos, sin


def rotate(
    x: Float[Array, "... L N H"], cos: Float[Array, "... L H/2"], sin: Float[Array, "... L H/2"]
) -> Float[Array, "... L N H"]:
    """Turn the pairs ``(i, i + H/2)`` of every head, in fp32 or wider, and round once to the dtype of ``x``."""
    wide = accumulator(x.dtype)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    cos, sin = cos[..., None, :].astype(wide), sin[..., None, :].astype(wide)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
