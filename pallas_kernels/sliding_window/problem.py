"""What an implementation of the window is asked for, and what an implementation is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp

from pallas_kernels.target import Target

if TYPE_CHECKING:
    from jax import Array

FEWEST_QUERIES = 16
"""Kernels work in tiles of queries; for a step of generation XLA's fusion of a matrix-vector product is as good."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and kinds of one call: B batch, T queries, N query heads, K key heads, H head width, W window."""

    B: int
    T: int
    N: int
    K: int
    H: int
    W: int
    dtype: jnp.dtype
    rope: bool

    @property
    def kernels_pay(self) -> bool:
        """A kernel is chosen unasked."""
        return self.T >= FEWEST_QUERIES


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute the window and its sinks; other meta memory is merged with it by the door.

    Attributes:
        attend: ``(q, k, v, q_segments, k_segments, sink, frequencies, window) -> (y, n)``, differentiable in q, k, v
            and sink, for cotangents of y and of n:

            - ``q[B,T,N,H]``, ``k[B,W+T,K,H]``, ``v[B,W+T,K,H]``: one dtype, bf16 or fp32 (fp64 for ``xla`` and
              ``reference``). Query head n reads key head n // (N/K).
            - ``q_segments[B,T]``, ``k_segments[B,W+T]`` int32 ≥ 0. Query i meets key j iff ``i < j ≤ i + W`` and
              ``q_segments_i = k_segments_j ≠ 0``.
            - ``sink[N]`` fp32: a logit at or below -1e29 is no sink.
            - ``frequencies[H/2]`` fp32 or None. Angle p·f turns the pairs (x_f, x_{f+H/2}) of a key at p = j and of a
              query at p = i + W, both counted from the start of the array or of a block, the same in every pass:
              ``(a, b) -> (a cos - b sin, b cos + a sin)`` in fp32, rounded to the inputs' dtype. Constant to autodiff.
            - ``s_ij = q_i·k_j / √H`` accumulated in fp32; ``n_i = log(Σ_j e^{s_ij} + e^{sink})`` in fp32 and
              ``y_i = Σ_j e^{s_ij - n_i} v_j`` in v's dtype. A query of segment 0, or one that meets no key where there
              is no sink: y = 0 and n = -1e30 exactly, with zero gradients.
        cannot_run: why it cannot compute a problem on a target, in one line; None where it can.
        kernel: opaque to XLA, which can split it over devices only as ``pallas_kernels.partition`` says.
    """

    attend: Callable[..., tuple[Array, Array]]
    cannot_run: Callable[[Problem, Target], str | None]
    kernel: bool = True


def differentiable(forward: Callable, backward: Callable) -> Callable[..., tuple[Array, Array]]:
    """The ``attend`` of a kernel that has a backward kernel of its own.

    Args:
        forward: as ``attend``.
        backward: ``(q, k, v, q_segments, k_segments, sink, frequencies, window, y, n, dy, dn) -> (dq, dk, dv, dsink)``.
            With ``p_ij = e^{s_ij - n_i}`` (0 where query i does not meet key j) and ``δ_i = dy_i·y_i``:
            ``dv_j = Σ p_ij dy_i``, ``ds_ij = p_ij (dy_i·v_j - δ_i + dn_i)``, and over the rows that are not padding
            ``dsink = Σ_i e^{sink - n_i} (dn_i - δ_i)``; dq, dk follow from ds, turned back. Each has its input's dtype.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
    def attend(q, k, v, q_segments, k_segments, sink, frequencies, window):
        return forward(q, k, v, q_segments, k_segments, sink, frequencies, window)

    def attend_fwd(q, k, v, q_segments, k_segments, sink, frequencies, window):
        y, n = forward(q, k, v, q_segments, k_segments, sink, frequencies, window)
        return (y, n), (q, k, v, q_segments, k_segments, sink, frequencies, y, n)

    def attend_bwd(window, saved, cotangents):
        *inputs, y, n = saved
        dq, dk, dv, dsink = backward(*inputs, window, y, n, *cotangents)
        return dq, dk, dv, None, None, dsink, None

    attend.defvjp(attend_fwd, attend_bwd)
    return cast("Callable[..., tuple[Array, Array]]", attend)
