"""One chunk inside the kernels: what is loaded, stored and looped over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.log_gate_attention.pallas_gpu.matmul import dot_wide, sum_of
from pallas_kernels.log_gate_attention.pallas_gpu.plan import STATE_PIECE, Plan

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def places(C: int) -> Int[Array, " C"]:
    return lax.iota(jnp.int32, C)


class Chunk:
    """Rows of chunk ``i`` of sequence ``b``: loads are 0 and stores go nowhere beyond ``T``."""

    def __init__(self, plan: Plan, b, i):
        self.plan, self.b, self.start = plan, b, i * plan.C
        self.whole = plan.T % plan.C == 0

    def _view(self, ref, index):
        view = ref.at[(self.b, pl.ds(self.start, self.plan.C), *index)]
        inside = self.start + places(self.plan.C) < self.plan.T
        return view, inside if len(view.shape) == 1 else inside[:, None]

    def load(self, ref, *index, other: float = 0.0) -> Array:
        view, inside = self._view(ref, index)
        return plgpu.load(view) if self.whole else plgpu.load(view, mask=inside, other=other)

    def store(self, ref, value: Array, *index) -> None:
        view, inside = self._view(ref, index)
        plgpu.store(view, value.astype(ref.dtype), mask=None if self.whole else inside)


class Loads:
    """Parts of given features, each loaded where it is used: operands of matmuls that wait take up the registers."""

    def __init__(self, chunk: Chunk, ref, head):
        self.chunk, self.ref, self.head = chunk, ref, head

    def __iter__(self) -> Iterator[Array]:
        return (self[p] for p in range(self.chunk.plan.parts))

    def __getitem__(self, p: int) -> Array:
        width = self.chunk.plan.width
        return self.chunk.load(self.ref, self.head, pl.ds(p * width, width))


def pieces_of(start, length: int, size: int) -> list[Any]:
    """Slices of an axis, so that no matmul takes more of it at once."""
    size = min(length, size)
    return [pl.ds(start + at, size) for at in range(0, length, size)]


def times_state(chunk: Chunk, ref, head, state_ref, index: tuple) -> Float[Array, "C width"]:
    """Rows of values, or of their cotangents, times a part of a transposed state, or of its cotangent."""
    pieces = pieces_of(0, chunk.plan.H, STATE_PIECE)
    return sum_of(dot_wide(chunk.load(ref, head, piece), state_ref[(*index, piece)]) for piece in pieces)


def loop(count: int, body: Callable, carry: Any) -> Any:
    """``carry = body(i, carry)`` for each of ``range(count)``."""
    if count == 1:
        return body(0, carry)
    return lax.fori_loop(np.int32(0), np.int32(count), body, carry)
