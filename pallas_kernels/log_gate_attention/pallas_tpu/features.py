"""Queries and keys of one chunk inside a kernel: features as given, or mapped from raw ones and never stored.

A map ``A [X, F/2]`` comes as ``[A, -A]``, filled with zeros to ``[X, F]`` in memory, so that one matmul gives the
scores of both halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.state import EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from pallas_kernels.log_gate_attention.pallas_tpu.layout import Plan


class Mapped(NamedTuple):
    """How features came about."""

    raw: Float[Array, "C X"]
    weights: Float[Array, "X F"]
    exact: Float[Array, "C F"]  # fp32, before rounding


class Features(NamedTuple):
    """Features as they enter the matmuls."""

    value: Float[Array, "C F"]  # in the inputs' dtype
    log_scale: Float[Array, "C 1"] | None = None  # of the map ``exp``
    mapped: Mapped | None = None  # None where they were given


def dot(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Float[Array, "rows columns"]:
    """Matmul over ``axes``, accumulated in fp32; fp32 operands are not rounded."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def dot_finely(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Float[Array, "rows columns"]:
    """The same where one of the two is fp32 and not to be rounded to the other's dtype: its rest is multiplied, too."""
    if a.dtype == b.dtype:
        return dot(a, b, axes)
    if a.dtype == jnp.float32:
        first, rest = _parts(a, b.dtype)
        return dot(first, b, axes) + dot(rest, b, axes)
    first, rest = _parts(b, a.dtype)
    return dot(a, first, axes) + dot(a, rest, axes)


def _parts(x: Float[Array, "rows columns"], dtype) -> tuple[Array, Array]:
    rounded = x.astype(dtype)
    return rounded, (x - rounded.astype(jnp.float32)).astype(dtype)


def _halves(plan: Plan, shape: tuple[int, ...]) -> tuple[Bool[Array, "C F"], Bool[Array, "C F"]]:
    """Where the first and the second half of the features lie."""
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    middle = plan.features // 2
    return place < middle, (place >= middle) & (place < plan.features)


def _over_half(plan: Plan, reduce: Callable, x: Float[Array, "C F"], neutral: float) -> Float[Array, "C F"]:
    """Each half reduced, at each place of it."""
    first, second = (reduce(jnp.where(half, x, neutral), 1, keepdims=True) for half in _halves(plan, x.shape))
    return jnp.where(_halves(plan, x.shape)[0], first, second)


def features(plan: Plan, x: Float[Array, "C X"], weights: Float[Array, "X F"] | None) -> Features:
    """The features of given or raw queries or keys ``x``."""
    if weights is None:
        return Features(x)
    scores = dot(x, weights)
    first, second = _halves(plan, scores.shape)
    if plan.act == "exp":
        log_scale = jnp.max(scores, 1, keepdims=True)
        exact = jnp.exp(jnp.where(first | second, scores - log_scale, EMPTY))
        return Features(exact.astype(plan.dtype), log_scale, Mapped(x, weights, exact))
    scores = jnp.where(first | second, scores, EMPTY)
    exact = jnp.exp(scores - _over_half(plan, jnp.max, scores, EMPTY))
    exact = exact / _over_half(plan, jnp.sum, exact, 0.0)
    return Features(exact.astype(plan.dtype), None, Mapped(x, weights, exact))


def to_raw(
    plan: Plan, mapped: Mapped, cotangent: Float[Array, "C F"]
) -> tuple[Float[Array, "C X"], Float[Array, "X F"]]:
    """Cotangents of raw queries or keys and of the weights, given that of the features; log scales are constants."""
    if plan.act == "softmax":
        cotangent = cotangent - _over_half(plan, jnp.sum, mapped.exact * cotangent, 0.0)
    scores = (mapped.exact * cotangent).astype(plan.dtype)
    return dot(scores, mapped.weights, (1, 1)), dot(mapped.raw, scores, (0, 0))
