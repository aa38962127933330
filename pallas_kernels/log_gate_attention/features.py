"""The feature map φ(x) = act(xA) ⊕ act(−xA) of queries and keys, and the op from raw queries and keys in plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.problem import Act
from pallas_kernels.numerics import ABSENT, EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def feature_map(
    x: Float[Array, "B T K X"], weights: Float[Array, "S X half"], act: Act
) -> tuple[Float[Array, "B T S F"], Float[Array, "B T S"]]:
    """Features of every head, ``F = 2·half``, in the dtype of ``x``, and their log scale.

    Head ``s`` of the map reads head ``s // (S/K)`` of ``x``. Weights are rounded to the dtype of ``x``; scores are
    fp32 (fp64 for fp64 ``x``).

    Args:
        act: ``softmax`` over the features of each half, with log scale 0; or ``exp``, which returns ``φ·e^-m`` and
            ``m = max |xA|``, so that no raw score is ever exponentiated. ``φ·e^-m`` and ``m`` are only used together,
            and their product does not depend on ``m``: it is a constant to autodiff.
    """
    (B, T, K, X), (S, _, half) = x.shape, weights.shape
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    scores = jnp.einsum(
        "btkx,kpxf->btkpf", x, weights.reshape(K, S // K, X, half).astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None, preferred_element_type=wide,
    ).reshape(B, T, S, half)  # fmt: skip
    if act == "softmax":
        features = jnp.concatenate([jax.nn.softmax(scores, -1), jax.nn.softmax(-scores, -1)], -1)
        return features.astype(x.dtype), jnp.zeros((B, T, S), wide)
    m = jax.lax.stop_gradient(jnp.max(jnp.abs(scores), -1))
    features = jnp.exp(jnp.concatenate([scores, -scores], -1) - m[..., None])
    return features.astype(x.dtype), m


def from_raw(attend: Callable) -> Callable:
    """``attend_mapped`` of an implementation that has no kernel for it: features first, then ``attend``."""

    def attend_mapped(q, k, v, g, c, state, q_map, k_map, act: Act, chunk: int):
        q_feat, q_scale = feature_map(q, q_map, act)
        k_feat, k_scale = feature_map(k, k_map, act)
        c = jnp.where(c > ABSENT, c + k_scale.astype(c.dtype), EMPTY)
        y, n, state = attend(q_feat, k_feat, v, g, c, state, True, chunk)
        return y, jnp.where(n > ABSENT, n + q_scale.astype(n.dtype), EMPTY), state

    return attend_mapped
