"""The recurrence, one token at a time: the definition every other implementation is held to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.features import from_raw
from pallas_kernels.log_gate_attention.problem import Implementation
from pallas_kernels.log_gate_attention.state import LinearState
from pallas_kernels.log_gate_attention.step import step

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def attend(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B T S F"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"] | Float[Array, "B T S F"],
    c: Float[Array, "B T S"],
    state: LinearState,
    normalize: bool,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """Scan ``step`` over time. Differentiable by autodiff, at the memory of one state per token."""
    del chunk  # a matter of speed, which this implementation does not seek
    wide = g.dtype

    def body(state: LinearState, token):
        y, n, state = step(*(x.astype(wide) for x in token), state=state, normalize=normalize)
        return state, (y, n)

    state, (y, n) = jax.lax.scan(body, state, tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, c)))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), jnp.moveaxis(n, 0, 1), state


IMPLEMENTATION = Implementation(attend, from_raw(attend), lambda problem, target: None, kernel=False)
