"""What the kernels have in common: a chunk's tokens as they come from its blocks, and the step from state to state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.log_gate_attention.pallas_tpu.decay import Decay
from pallas_kernels.log_gate_attention.pallas_tpu.features import Features, features
from pallas_kernels.log_gate_attention.pallas_tpu.matmul import dot, dot_exactly, dot_finely
from pallas_kernels.log_gate_attention.pallas_tpu.rows import stacked
from pallas_kernels.log_gate_attention.state import SMALLEST
from pallas_kernels.numerics import ABSENT

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from pallas_kernels.log_gate_attention.pallas_tpu.layout import Blocks, Plan


def inputs(plan: Plan, blocks: Blocks) -> dict[str, pl.BlockSpec]:
    """Blocks of the op's arguments but the state."""
    one_for_all = plan.act is not None
    return {
        "q": blocks.of_state_heads(plan.R * plan.X),
        "k": blocks.of_kv_heads(plan.X) if one_for_all else blocks.of_state_heads(plan.X),
        "v": blocks.of_kv_heads(plan.H),
        "g": blocks.rows(1),
        "c": blocks.rows(1),
        "q_map": blocks.maps(plan.G),
        "k_map": blocks.maps(plan.P),
    }


def state_shapes(plan: Plan) -> dict[str, tuple[int, int]]:
    """Of one head's state in memory."""
    return {"kv": (plan.F, plan.H), "z": (1, plan.F), "m": (1, 1)}


def begin(plan: Plan, ins: dict, held: dict, prefix: str = "") -> None:
    """At the first chunk, fill what a kernel holds from chunk to chunk from the inputs of the same names."""
    turn = pl.program_id(3)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for name, ref in held.items():
            ref[pl.ds(turn * plan.M, plan.M)] = ins[prefix + name][0]


class Chunk:
    """One chunk of the ``head``-th state head of a step: reads its blocks, blanks what lies behind the last token."""

    def __init__(self, plan: Plan, refs: dict, index: Array, head: int) -> None:
        self._plan = plan
        self._refs = refs
        self._left = plan.T - index * plan.C
        self.head = head
        self.place = pl.program_id(3) * plan.M + head
        self.kv_head = head if plan.P == 1 else 0

    def tokens(self, name: str, head: int, width: int) -> Array:
        """``[C, width]`` of the block ``name``, of its ``head``-th head."""
        x = self._refs[name][0, :, head * width : (head + 1) * width]
        if self._plan.T % self._plan.C:
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < self._left, x, jnp.zeros((), x.dtype))
        return x

    def of_query(self, name: str, head: int, width: int) -> Array:
        """The same of the state head's ``head``-th query head."""
        return self.tokens(name, self.head * self._plan.R + head, width)

    def query(self, head: int) -> Features:
        weights = self._refs["q_map"][self.place * self._plan.R + head] if self._plan.act else None
        return features(self._plan, self.of_query("q", head, self._plan.X), weights)

    def key(self) -> Features:
        if self._plan.act is None:
            return features(self._plan, self.tokens("k", self.head, self._plan.X), None)
        return features(self._plan, self.tokens("k", self.kv_head, self._plan.X), self._refs["k_map"][self.place])

    def values(self) -> Float[Array, "C H"]:
        return self.tokens("v", self.kv_head, self._plan.H)

    def gates(self) -> Float[Array, "1 C"]:
        return self._refs["g"][0, self.head, 0]

    def key_scales(self, key: Features) -> Float[Array, "1 C"]:
        """Log scale of each key, that of its features included."""
        c = self._refs["c"][0, self.head, 0]
        return c if key.log_scale is None else jnp.where(c > ABSENT, c + key.log_scale, c)


def inverse(den: Float[Array, "1 C"]) -> Float[Array, "1 C"]:
    """``1/den``, and 0 where nothing was met."""
    held = den > SMALLEST
    return jnp.where(held, pltpu.reciprocal(jnp.where(held, den, 1.0)), 0.0)


def advance(
    decay: Decay,
    k: Features,
    v: Float[Array, "C H"],
    kv: Float[Array, "F H"],
    z: Float[Array, "1 F"],
    finely: bool = False,
) -> tuple[Float[Array, "F H"], Float[Array, "1 F"]]:
    """The state after the chunk; ``finely``, as gradients want it, what it takes is not rounded."""
    taken = decay.take * k.columns.astype(jnp.float32)
    filled = dot_finely(taken, v) if finely else dot(taken.astype(v.dtype), v)
    return (
        decay.keep * kv + filled,
        decay.keep * z + k.summed_by(stacked(decay.take), dot_exactly)[:1],
    )
