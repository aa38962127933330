"""Rotation by position: pairs of features half a head apart turn by angles proportional to their position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from pallas_kernels.sliding_window.problem import accumulator

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Float, Int


def tables(
    frequencies: Float[Array, " H/2"], positions: Int[Array, "*L"]
) -> tuple[Float[Array, "*L H/2"], Float[Array, "*L H/2"]]:
    """``cos(p f)`` and ``sin(p f)`` of every position and frequency, in the dtype of the frequencies.

    An fp32 product of hundreds would miss by 1e-5, so the angle is the sum of a coarse part, exact for positions below
    4096, and a small one.
    """
    coarse = lax.reduce_precision(frequencies, exponent_bits=8, mantissa_bits=11)
    at = positions[..., None].astype(frequencies.dtype)
    large, small = at * coarse, at * (frequencies - coarse)
    return (
        jnp.cos(large) * jnp.cos(small) - jnp.sin(large) * jnp.sin(small),
        jnp.sin(large) * jnp.cos(small) + jnp.cos(large) * jnp.sin(small),
    )


def rotate(
    x: Float[Array, "... L N H"], cos: Float[Array, "... L H/2"], sin: Float[Array, "... L H/2"]
) -> Float[Array, "... L N H"]:
    """Turn the pairs ``(i, i + H/2)`` of every head, in fp32 or wider, and round once to the dtype of ``x``."""
    wide = accumulator(x.dtype)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    cos, sin = cos[..., None, :].astype(wide), sin[..., None, :].astype(wide)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
