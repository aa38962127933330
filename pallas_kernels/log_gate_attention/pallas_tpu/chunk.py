"""What the kernels have in common: a chunk's tokens as they come from its blocks, and the step from state to state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.log_gate_attention.pallas_tpu.decay import Decay, row
from pallas_kernels.log_gate_attention.pallas_tpu.features import Features, dot_finely, features
from pallas_kernels.log_gate_attention.state import ABSENT, SMALLEST

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from pallas_kernels.log_gate_attention.pallas_tpu.layout import Blocks, Plan


def inputs(plan: Plan, blocks: Blocks) -> dict[str, pl.BlockSpec]:
    """Blocks of the op's arguments but the state."""
    one_for_all = plan.act is not None
    return {
        "q": blocks.of_state_head(plan.R * plan.X),
        "k": blocks.of_kv_head(plan.X) if one_for_all else blocks.of_state_head(plan.X),
        "v": blocks.of_kv_head(plan.H),
        "g": blocks.row(1),
        "c": blocks.row(1),
        "q_map": blocks.maps(plan.G),
        "k_map": blocks.maps(plan.P),
    }


def state_shapes(plan: Plan) -> dict[str, tuple[int, int]]:
    """Of one head's state in memory."""
    return {"kv": (plan.F, plan.H), "z": (1, plan.F), "m": (1, 1)}


class Chunk:
    """One chunk of one state head: reads its blocks, and blanks what lies behind the last token."""

    def __init__(self, plan: Plan, refs: dict, index: Array) -> None:
        self._plan = plan
        self._refs = refs
        self._left = plan.T - index * plan.C
        self._head = pl.program_id(3)

    def rows(self, name: str, head: int = 0, width: int | None = None) -> Array:
        """``[C, width]`` of the block ``name``, of its ``head``-th head."""
        ref = self._refs[name]
        width = ref.shape[2] if width is None else width
        x = ref[0, :, head * width : (head + 1) * width]
        if self._plan.T % self._plan.C:
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < self._left, x, jnp.zeros((), x.dtype))
        return x

    def query(self, head: int) -> Features:
        weights = self._refs["q_map"][self._head * self._plan.R + head] if self._plan.act else None
        return features(self._plan, self.rows("q", head, self._plan.X), weights)

    def key(self) -> Features:
        return features(self._plan, self.rows("k"), self._refs["k_map"][self._head] if self._plan.act else None)

    def gates(self) -> Float[Array, "1 C"]:
        return self._refs["g"][0, 0, 0]

    def key_scales(self, key: Features) -> Float[Array, "1 C"]:
        """Log scale of each key, that of its features included."""
        c = self._refs["c"][0, 0, 0]
        return c if key.log_scale is None else jnp.where(c > ABSENT, c + row(key.log_scale), c)


def inverse(den: Float[Array, "C 1"]) -> Float[Array, "C 1"]:
    """``1/den``, and 0 where nothing was met."""
    held = den > SMALLEST
    return jnp.where(held, pltpu.reciprocal(jnp.where(held, den, 1.0)), 0.0)


def advance(
    decay: Decay,
    k: Float[Array, "C F"],
    v: Float[Array, "C H"],
    kv: Float[Array, "F H"],
    z: Float[Array, "1 F"],
    finely: bool = False,
) -> tuple[Float[Array, "F H"], Float[Array, "1 F"]]:
    """The state after the chunk; ``finely``, as gradients want it, what it takes is not rounded."""
    taken = decay.take * k.astype(jnp.float32)
    return (
        decay.keep * kv + dot_finely(taken if finely else taken.astype(k.dtype), v, (0, 0)),
        decay.keep * z + jnp.sum(taken, 0, keepdims=True),
    )
