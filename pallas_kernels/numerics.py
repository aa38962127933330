"""The numbers that mark what is not there, and what sums are computed in."""

from __future__ import annotations

import jax.numpy as jnp

EMPTY = -1e30
"""The log weight of what is not there: finite, so that differences of two of them stay numbers."""
ABSENT = -1e29
"""A log weight at or below this is not there."""


def accumulator(*dtypes: jnp.dtype) -> jnp.dtype:
    """What scores, sums and normalizers of inputs of these dtypes are computed in: fp32, or fp64 beside any fp64."""
    return jnp.dtype(jnp.float64 if any(dtype == jnp.float64 for dtype in dtypes) else jnp.float32)
