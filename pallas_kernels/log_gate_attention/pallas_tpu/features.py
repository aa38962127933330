"""Queries and keys of one chunk inside a kernel: features as given, or mapped from raw ones and never stored.

Given features are rows as they come. Mapped ones are columns, ``[F, C]``: their reductions run over rows, and what is
one number a token is a row. A map ``A [X, F/2]`` comes as ``[A, -A]`` transposed and filled with zeros to ``[F, X]``,
so that one matmul gives the scores of both halves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.pallas_tpu.matmul import dot
from pallas_kernels.log_gate_attention.state import EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from pallas_kernels.log_gate_attention.pallas_tpu.layout import Plan


class Mapped(NamedTuple):
    """How features came about."""

    raw: Float[Array, "C X"]
    weights: Float[Array, "F X"]
    exact: Float[Array, "F C"]  # fp32, before rounding


class Features(NamedTuple):
    """Features as they enter the matmuls, in the inputs' dtype: rows where they were given, columns where mapped."""

    plan: Plan
    value: Float[Array, "C F"] | Float[Array, "F C"]
    log_scale: Float[Array, "1 C"] | None = None  # of the map ``exp``
    mapped: Mapped | None = None  # None where they were given

    @property
    def rows(self) -> Float[Array, "C F"]:
        return self.value if self.mapped is None else self._turned

    @property
    def columns(self) -> Float[Array, "F C"]:
        return self._turned if self.mapped is None else self.value

    @property
    def _turned(self) -> Array:
        """Transposed. Interpreted on a CPU, XLA would make it part of a bf16 matmul, which it then cannot run."""
        return jax.lax.optimization_barrier(self.value.T) if self.plan.interpret else self.value.T

    def met_by(self, x: Float[Array, "rows F"]) -> Float[Array, "rows C"]:
        """The product of each row of ``x`` and each token's features."""
        return dot(x, self.value, (1, 1 if self.mapped is None else 0))

    def summed_by(self, weights: Float[Array, "rows C"], matmul: Callable = dot) -> Float[Array, "rows F"]:
        """Sums of the tokens' features, one for each row of weights."""
        return matmul(weights, self.value, (1, 0 if self.mapped is None else 1))


def _halves(plan: Plan, shape: tuple[int, ...]) -> tuple[Bool[Array, "F C"], Bool[Array, "F C"]]:
    """Where the first and the second half of the features lie."""
    place = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    middle = plan.features // 2
    return place < middle, (place >= middle) & (place < plan.features)


def _over_half(plan: Plan, reduce: Callable, x: Float[Array, "F C"], neutral: float) -> Float[Array, "F C"]:
    """Each half reduced, at each place of it."""
    first, second = (reduce(jnp.where(half, x, neutral), 0, keepdims=True) for half in _halves(plan, x.shape))
    return jnp.where(_halves(plan, x.shape)[0], first, second)


def features(plan: Plan, x: Float[Array, "C X"], weights: Float[Array, "F X"] | None) -> Features:
    """The features of given or raw queries or keys ``x``."""
    if weights is None:
        return Features(plan, x)
    scores = dot(weights, x, (1, 1))
    first, second = _halves(plan, scores.shape)
    if plan.act == "exp":
        log_scale = jnp.max(scores, 0, keepdims=True)
        exact = jnp.exp(jnp.where(first | second, scores - log_scale, EMPTY))
        return Features(plan, exact.astype(plan.dtype), log_scale, Mapped(x, weights, exact))
    scores = jnp.where(first | second, scores, EMPTY)
    exact = jnp.exp(scores - _over_half(plan, jnp.max, scores, EMPTY))
    exact = exact / _over_half(plan, jnp.sum, exact, 0.0)
    return Features(plan, exact.astype(plan.dtype), None, Mapped(x, weights, exact))


def to_raw(
    plan: Plan, mapped: Mapped, cotangent: Float[Array, "F C"]
) -> tuple[Float[Array, "C X"], Float[Array, "F X"]]:
    """Cotangents of raw queries or keys and of the weights, given that of the features; log scales are constants."""
    if plan.act == "softmax":
        cotangent = cotangent - _over_half(plan, jnp.sum, mapped.exact * cotangent, 0.0)
    scores = (mapped.exact * cotangent).astype(plan.dtype)
    return dot(scores.T, mapped.weights), dot(scores, mapped.raw)
