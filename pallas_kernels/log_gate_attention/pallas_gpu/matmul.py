"""Matrix products inside the kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from pallas_kernels.pallas_triton import dot

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def in_two(x: Array, dtype: Any) -> tuple[Array, ...]:
    """An fp32 operand in a matmul's dtype: rounded, and what rounding took, if anything."""
    rounded = x.astype(dtype)
    if rounded.dtype == x.dtype:
        return (x,)
    return rounded, (x - rounded.astype(x.dtype)).astype(dtype)


def dot_wide(a: Float[Array, "_ _"], b: Float[Array, "_ _"], axes: tuple[int, int] = (1, 0)) -> Float[Array, "_ _"]:
    """``dot`` with an fp32 second operand that is not rounded."""
    return sum_of(dot(a, part, axes) for part in in_two(b, a.dtype))


def sum_of(terms) -> Array:
    return functools.reduce(jnp.add, terms)
