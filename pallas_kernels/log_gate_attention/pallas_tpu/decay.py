"""Decays of one chunk inside a kernel, from a row of gates and a row of key scales.

A pair's key is its row and its query its column: what is one number a query is a row, one register, and sums over keys
add registers. Across lanes they would go through the units that also transpose, which would bound the kernels.

Every exponent is an exact difference. A gate is split in a coarse part, a multiple of 1/128, whose sums over a chunk
are exact in fp32, and a small rest; so no sum of gates is rounded next to a hard forget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from pallas_kernels.log_gate_attention.pallas_tpu.matmul import dot_exactly
from pallas_kernels.log_gate_attention.pallas_tpu.rows import columns, places, stacked
from pallas_kernels.numerics import ABSENT, EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class Decay(NamedTuple):
    """What gates and key scales come to, all relative to a scale ``M`` of each query; fp32."""

    pair: Float[Array, "C C"]  # of key j and query i: e^(g_{j+1} + … + g_i + c_j - M_i), 0 for keys that i does not see
    carried: Float[Array, "1 C"]  # the same of the carried state
    level: Float[Array, "1 C"]  # log weight that a pair of 1 stands for
    take: Float[Array, "1 C"]  # what the next state takes of each key
    take_column: Float[Array, "C 1"]  # the same
    keep: Float[Array, "1 1"]  # what it keeps of the carried one
    m: Float[Array, "1 1"]  # its scale


def _split(x: Float[Array, "1 C"]) -> tuple[Float[Array, "1 C"], Float[Array, "1 C"]]:
    coarse = jnp.floor(x * 128.0 + 0.5) / 128.0
    return coarse, x - coarse


def decays(g: Float[Array, "1 C"], c: Float[Array, "1 C"], m: Float[Array, "1 1"]) -> Decay:
    """Decays of a chunk that starts from a state of scale ``m``.

    ``g`` is above -500, or exactly -1e30 where everything is forgotten; ``c`` is -1e30 for an absent key.
    """
    C = g.shape[1]
    key, query = places(C)
    forgets = g <= ABSENT
    coarse, rest = _split(jnp.where(forgets, 0.0, g))
    # Sums up to each token, of borders too: a query sees the keys behind its last border, which have met as many.
    sums = dot_exactly(
        stacked(coarse, rest, jnp.where(forgets, 1.0, 0.0)), jnp.where(key <= query, 1.0, 0.0).astype(jnp.bfloat16)
    )
    sum_coarse, sum_rest, borders = sums[0:1], sums[1:2], sums[2:3]

    high, low = _split(c)
    high, low, met = high - sum_coarse, low - sum_rest, jnp.where(c > ABSENT, borders, -1.0)
    high_column, low_column, met_column = columns(high, low, met)
    visible = (key <= query) & (met_column == borders)
    before = jnp.where(borders == 0.0, m, EMPTY)
    scale = jnp.maximum(jnp.max(jnp.where(visible, high_column, EMPTY), 0, keepdims=True), before)
    exponent = jnp.where(visible, (high_column - scale) + low_column, EMPTY)
    carried = jnp.where(before > ABSENT, before - scale, EMPTY)

    # The next state's scale is rounded; what is rounded off goes into its weights.
    last, total = scale[:, C - 1 :], sum_coarse[:, C - 1 :]
    rounded = last + total
    added = rounded - last
    finer = ((last - (rounded - added)) + (total - added)) + sum_rest[:, C - 1 :]
    at_end = jnp.where(met == borders[:, C - 1 :], (high - last) + low, EMPTY)
    return Decay(
        pair=jnp.exp(exponent),
        carried=jnp.exp(carried),
        level=(scale + sum_coarse) + sum_rest,
        take=jnp.exp(at_end + finer),
        take_column=jnp.exp(exponent[:, C - 1 :] + finer),
        keep=jnp.exp(carried[:, C - 1 :] + finer),
        m=jnp.where(last > ABSENT, rounded, EMPTY),
    )
