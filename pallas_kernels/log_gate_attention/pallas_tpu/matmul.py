"""Matmuls inside a kernel, accumulated in fp32, and how finely they see fp32 operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def dot(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Float[Array, "rows columns"]:
    """Matmul over ``axes``; fp32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


class Stack(NamedTuple):
    """Matrices one below the other, to meet another one in a single matmul.

    Those in fp32 that must not be rounded to the matmul's dtype are there as sums of several parts.
    """

    value: Float[Array, "rows inner"]
    heights: tuple[int, ...]
    parts: tuple[int, ...]

    def split(self, product: Float[Array, "rows columns"]) -> tuple[Float[Array, "height columns"], ...]:
        """The product of each matrix, of that of all of them."""
        products, at = [], 0
        for height, parts in zip(self.heights, self.parts, strict=True):
            pieces = [product[at + i * height : at + (i + 1) * height] for i in range(parts)]
            products.append(sum(pieces[1:], pieces[0]))
            at += height * parts
        return tuple(products)


def stack(dtype, *matrices: tuple[Array, int]) -> Stack:
    """Matrices of heights that are multiples of 8 with the number of bf16 numbers that each of theirs is the sum of.

    Two hold 16 bits of an fp32 number, three all 24. In fp32 every matrix is one part.
    """
    split = [_parts(x, dtype, n) for x, n in matrices]
    value = jnp.concatenate([part for parts in split for part in parts], 0).astype(dtype)
    return Stack(value, tuple(x.shape[0] for x, _ in matrices), tuple(map(len, split)))


def _parts(x: Array, dtype, n: int) -> list[Array]:
    if dtype == jnp.float32 or n == 1:
        return [x.astype(dtype)]
    parts = []
    for _ in range(n):
        part = x.astype(dtype)
        parts, x = [*parts, part], x - part.astype(jnp.float32)
    return parts


def dot_exactly(
    x: Float[Array, "rows inner"], b: Array, axes: tuple[int, int] = (1, 0)
) -> Float[Array, "rows columns"]:
    """``x @ b`` in fp32, where ``b`` may be bf16."""
    whole = stack(b.dtype, (x, 3))
    return whole.split(dot(whole.value, b, axes))[0]


def dot_finely(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Float[Array, "rows columns"]:
    """``a @ b`` with 16 bits of the one that is fp32, where the other may be bf16."""
    if a.dtype == jnp.float32:
        whole = stack(b.dtype, (a, 2))
        return whole.split(dot(whole.value, b, axes))[0]
    first, second = (dot(a, part, axes) for part in _parts(b, a.dtype, 2))
    return first + second
