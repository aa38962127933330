"""Queries and keys of one chunk inside a kernel: features as given, or mapped from raw ones and never stored.

Given features are rows as they come. Mapped ones are columns, ``[F, C]``: their reductions run over rows, and what is
one number a token is a row. A map ``A [X, E]`` comes transposed and filled with zeros to ``[F/2, X]``; its scores, and
below them their negatives, are the exponents of the features, each half of which is filled up to ``F/2``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.pallas_tpu.matmul import dot
from pallas_kernels.numerics import EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from pallas_kernels.log_gate_attention.pallas_tpu.layout import Plan


class Mapped(NamedTuple):
    """How features came about."""

    raw: Float[Array, "C X"]
    weights: Float[Array, "half X"]
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


def features(plan: Plan, x: Float[Array, "C X"], weights: Float[Array, "half X"] | None) -> Features:
    """The features of given or raw queries or keys ``x``."""
    if weights is None:
        return Features(plan, x)
    scores = dot(weights, x, (1, 1))
    if plan.act == "exp":
        log_scale = jnp.max(jnp.abs(scores), 0, keepdims=True)
        halves = [_exp(plan, signed - log_scale) for signed in (scores, -scores)]
    else:
        log_scale = None
        halves = [_softmax(plan, signed) for signed in (scores, -scores)]
    exact = jnp.concatenate(halves, 0)
    return Features(plan, exact.astype(plan.dtype), log_scale, Mapped(x, weights, exact))


def _there(plan: Plan, x: Float[Array, "half C"]) -> Float[Array, "half C"]:
    """``x`` with nothing behind the last score."""
    if plan.features == plan.F:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < plan.features // 2, x, EMPTY)


def _exp(plan: Plan, exponents: Float[Array, "half C"]) -> Float[Array, "half C"]:
    return jnp.exp(_there(plan, exponents))


def _softmax(plan: Plan, scores: Float[Array, "half C"]) -> Float[Array, "half C"]:
    weights = _exp(plan, scores - jnp.max(_there(plan, scores), 0, keepdims=True))
    return weights / jnp.sum(weights, 0, keepdims=True)


def to_raw(
    plan: Plan, mapped: Mapped, cotangent: Float[Array, "F C"]
) -> tuple[Float[Array, "C X"], Float[Array, "half X"]]:
    """Cotangents of raw queries or keys and of the weights, given that of the features; log scales are constants."""
    half = plan.F // 2
    first, second = (_to_scores(plan, mapped.exact[at], cotangent[at]) for at in (slice(half), slice(half, None)))
    scores = (first - second).astype(plan.dtype)
    return dot(scores.T, mapped.weights), dot(scores, mapped.raw)


def _to_scores(plan: Plan, exact: Float[Array, "half C"], cotangent: Float[Array, "half C"]) -> Float[Array, "half C"]:
    if plan.act == "softmax":
        cotangent = cotangent - jnp.sum(exact * cotangent, 0, keepdims=True)
    return exact * cotangent
