"""Weights of what is in memory, and from weighted sums to what a caller reads: output and log normalizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.state import SMALLEST
from pallas_kernels.numerics import EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


@jax.custom_vjp
def _divide(num: Float[Array, "*rows H"], den: Float[Array, "*rows"]) -> Float[Array, "*rows H"]:
    return num / den[..., None]


def _divide_fwd(num, den):
    out = num / den[..., None]
    return out, (out, den)


def _divide_bwd(saved, cotangent):
    # The usual rule squares the denominator, which overflows fp32 long before the gradient does.
    out, den = saved
    return cotangent / den[..., None], -jnp.sum(cotangent * out, -1) / den


_divide.defvjp(_divide_fwd, _divide_bwd)


def weight(there: Bool[Array, "*#any"], exponent: Float[Array, "*#any"]) -> Float[Array, "*any"]:
    """``e^exponent``, and 0 without a gradient for what is not there."""
    return jnp.where(there, jnp.exp(jnp.where(there, exponent, 0.0)), 0.0)


def holds(den: Float[Array, "*rows"]) -> Bool[Array, "*rows"]:
    """Where a row has met any key: its denominator is above zero."""
    return den > SMALLEST


def unscale(x: Float[Array, "*rows H"], m: Float[Array, "*rows"]) -> Float[Array, "*rows H"]:
    """``x · e^m`` in two halves, so that only a result out of range overflows; 0 where ``m`` marks empty memory."""
    half = jnp.exp(0.5 * m)[..., None]
    return x * half * half


def read(
    num: Float[Array, "*rows H"], den: Float[Array, "*rows"], m: Float[Array, "*rows"], normalize: bool
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
    """Output and log normalizer of rows whose sums are scaled by ``e^-m``.

    ``y = num / den`` (or ``num · e^m``) and ``n = m + log den``. Where ``den`` is zero they are 0 and -1e30, and their
    gradients 0.
    """
    nonempty = holds(den)
    safe = jnp.where(nonempty, den, 1.0)
    n = jnp.where(nonempty, m + jnp.log(safe), EMPTY)
    if normalize:
        return _divide(jnp.where(nonempty[..., None], num, 0.0), safe), n
    return unscale(num, m), n
