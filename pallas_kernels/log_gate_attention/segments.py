"""Packed documents said in gates: a border is a gate that forgets everything, padding is a key that is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def borders(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a document starts that is not the first: the last id before it that is not 0 exists and differs."""
    real = segment_ids != 0
    index = jnp.where(real, jnp.arange(segment_ids.shape[1]), -1)
    latest = jax.lax.cummax(index, axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    return real & (before >= 0) & (previous != segment_ids)


def apply_segments(
    q: Float[Array, "B T N F"],
    g: Float[Array, "B T S"] | Float[Array, "B T S F"],
    c: Float[Array, "B T S"],
    segment_ids: Int[Array, "B T"],
):
    """Queries, gates and key scales that keep each document to itself.

    At a border the log gate is -1e30. At padding the query is 0, the log gate 0 and the key absent, so that nothing
    is read, forgotten or written there.
    """
    padding = segment_ids == 0
    late = (1,) * (g.ndim - 2)
    g = jnp.where(borders(segment_ids).reshape(*segment_ids.shape, *late), EMPTY, g)
    g = jnp.where(padding.reshape(*segment_ids.shape, *late), 0.0, g)
    c = jnp.where(padding[..., None], EMPTY, c)
    q = jnp.where(padding[..., None, None], jnp.zeros((), q.dtype), q)
    return q, g, c
