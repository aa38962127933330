"""The fixed-size memory of gated linear attention."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float

SMALLEST = 1e-30  # a denominator, relative to the row's largest decay, that counts as zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearState:
    """Sums over the keys seen so far, each weighted by ``e^(log weight - m)``.

    ``kv = Σ_j e^(l_j - m) k_j v_jᵀ`` and ``z = Σ_j e^(l_j - m) k_j``, where ``l_j`` is the key's log scale plus the
    gates since. ``m`` follows the largest ``l_j``, so nothing overflows; under gates of one value per feature each
    feature has its own. It is a scale, not a quantity of its own: adding a constant to ``m`` and multiplying ``kv`` and
    ``z`` by ``e^-constant`` is the same memory. So ``m`` is a constant to autodiff, in a state given and in one
    returned; gradients travel by ``kv`` and ``z``.
    """

    kv: Float[Array, "B S F H"]
    z: Float[Array, "B S F"]
    m: Float[Array, "B S"] | Float[Array, "B S F"]


def empty_state(
    batch: int, state_heads: int, features: int, head_width: int, dtype=jnp.float32, *, vector_gates: bool = False
) -> LinearState:
    """A memory with nothing in it: ``kv = 0``, ``z = 0``, ``m = -1e30``.

    ``dtype`` is fp32, or fp64 for tests. ``vector_gates`` gives ``m`` the axis ``F`` that gates of one value per
    feature need; a loop that carries the state wants it from the start.
    """
    return LinearState(
        kv=jnp.zeros((batch, state_heads, features, head_width), dtype),
        z=jnp.zeros((batch, state_heads, features), dtype),
        m=jnp.full((batch, state_heads, features) if vector_gates else (batch, state_heads), EMPTY, dtype),
    )
