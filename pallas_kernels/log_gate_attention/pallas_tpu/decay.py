"""Decays of one chunk inside a kernel, from a row of gates and a row of key scales.

Every exponent is an exact difference. A gate is split in a coarse part, a multiple of 1/128, whose sums over a chunk
are exact in fp32, and a small rest; so no sum of gates is rounded next to a hard forget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.state import ABSENT, EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Decay(NamedTuple):
    """What gates and key scales come to, all relative to a scale ``M`` of each row; fp32."""

    pair: Float[Array, "C C"]  # e^(g_{j+1} + … + g_i + c_j - M_i), 0 for keys that row i does not see
    carried: Float[Array, "C 1"]  # the same of the carried state
    level: Float[Array, "C 1"]  # log weight that a pair of 1 stands for
    take: Float[Array, "C 1"]  # what the next state takes of each key
    keep: Float[Array, "1 1"]  # what it keeps of the carried one
    m: Float[Array, "1 1"]  # its scale


def places(C: int) -> tuple[Array, Array]:
    """Row and column of each element of a matrix ``[C, C]``."""
    return jax.lax.broadcasted_iota(jnp.int32, (C, C), 0), jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)


def column(row: Float[Array, "1 C"]) -> Float[Array, "C 1"]:
    """Transpose, exactly."""
    i, j = places(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0.0), 1, keepdims=True)


def row(column: Float[Array, "C 1"]) -> Float[Array, "1 C"]:
    """Transpose, exactly."""
    i, j = places(column.shape[0])
    return jnp.sum(jnp.where(i == j, column, 0.0), 0, keepdims=True)


def _split(x: Float[Array, "1 C"]) -> tuple[Float[Array, "1 C"], Float[Array, "1 C"]]:
    coarse = jnp.floor(x * 128.0 + 0.5) / 128.0
    return coarse, x - coarse


def _up_to(row: Float[Array, "1 C"], seen: Bool[Array, "C C"]) -> Float[Array, "C 1"]:
    return jnp.sum(jnp.where(seen, row, 0.0), 1, keepdims=True)


def decays(g: Float[Array, "1 C"], c: Float[Array, "1 C"], m: Float[Array, "1 1"]) -> Decay:
    """Decays of a chunk that starts from a state of scale ``m``.

    ``g`` is above -500, or exactly -1e30 where everything is forgotten; ``c`` is -1e30 for an absent key.
    """
    C = g.shape[1]
    i, j = places(C)
    gates, coarse_rest = jnp.broadcast_to(g, (C, C)), _split(jnp.where(g > ABSENT, g, 0.0))
    sum_coarse, sum_rest = (_up_to(part, j <= i) for part in coarse_rest)
    border = jnp.max(
        jnp.where((j <= i) & (gates <= ABSENT), j.astype(jnp.float32), -1.0), 1, keepdims=True
    )  # the latest token at which everything was forgotten
    visible = (j <= i) & (j.astype(jnp.float32) >= border) & (jnp.broadcast_to(c, (C, C)) > ABSENT)

    high, low = _split(c)
    high, low = high - row(sum_coarse), low - row(sum_rest)
    before = jnp.where(border < 0.0, m, EMPTY)
    scale = jnp.maximum(jnp.max(jnp.where(visible, high, EMPTY), 1, keepdims=True), before)
    exponent = jnp.where(visible, (high - scale) + low, EMPTY)
    carried = jnp.where(before > ABSENT, before - scale, EMPTY)

    # The next state's scale is rounded; what is rounded off goes into its weights.
    last, total = scale[C - 1 :], sum_coarse[C - 1 :]
    rounded = last + total
    added = rounded - last
    finer = ((last - (rounded - added)) + (total - added)) + sum_rest[C - 1 :]
    return Decay(
        pair=jnp.exp(exponent),
        carried=jnp.exp(carried),
        level=(scale + sum_coarse) + sum_rest,
        take=column(jnp.exp(exponent[C - 1 :] + finer)),
        keep=jnp.exp(carried[C - 1 :] + finer),
        m=jnp.where(last > ABSENT, rounded, EMPTY),
    )
