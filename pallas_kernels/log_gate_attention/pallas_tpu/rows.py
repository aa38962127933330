"""What is one number a token: rows, a register each, and how they become columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

ROWS = 8  # of a register


def places(C: int) -> tuple[Array, Array]:
    """Row and column of each element of a matrix ``[C, C]``."""
    return jax.lax.broadcasted_iota(jnp.int32, (C, C), 0), jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)


def row(column: Float[Array, "C 1"]) -> Float[Array, "1 C"]:
    """Transpose, exactly."""
    i, j = places(column.shape[0])
    return jnp.sum(jnp.where(i == j, column, 0.0), 0, keepdims=True)


def stacked(*rows: Float[Array, "1 C"]) -> Float[Array, "8 C"]:
    """Up to 8 rows in one register, zeros below them."""
    C = rows[0].shape[1]
    place = jax.lax.broadcasted_iota(jnp.int32, (ROWS, C), 0)
    filled = jnp.zeros((ROWS, C), jnp.float32)
    for i, x in enumerate(rows):
        filled = jnp.where(place == i, x, filled)
    return filled


def columns(*rows: Float[Array, "1 C"]) -> tuple[Float[Array, "C 1"], ...]:
    """Up to 8 rows, each transposed."""
    turned = stacked(*rows).T
    return tuple(turned[:, i : i + 1] for i in range(len(rows)))
