"""What an implementation is asked for, and what an implementation is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.target import Target

Act = Literal["exp", "softmax"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and kinds of one call of the op; axis letters as in its docstring.

    Attributes:
        act: the feature map to compute inside, or None where features are given.
        width: of raw queries and keys, where ``act`` is given.
    """

    B: int
    T: int
    N: int
    S: int
    K: int
    F: int
    H: int
    dtype: jnp.dtype
    vector_gates: bool = False
    act: Act | None = None
    width: int | None = None

    @property
    def kernels_pay(self) -> bool:
        """A kernel is chosen unasked: a step of generation has a function of its own."""
        return True


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute the op.

    Attributes:
        attend: ``(q, k, v, g, c, state, normalize, chunk) -> (y, n, state)`` on prepared arguments: ``g`` is 0, above
            -500, or exactly -1e30; ``c`` of an absent key is exactly -1e30; both are fp32, and so is ``state``.
        attend_mapped: the same from raw queries and keys, always normalized: ``(q, k, v, g, c, state, q_map, k_map,
            act, chunk)``; ``n`` includes the queries' log scales.
        cannot_run: why it cannot compute a problem on a target, in one line; None where it can.
        kernel: it is opaque to XLA, which can neither split it over devices nor mix dtypes in it.
    """

    attend: Callable
    attend_mapped: Callable
    cannot_run: Callable[[Problem, Target], str | None]
    kernel: bool = True
