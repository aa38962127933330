"""The op on a GPU from raw queries and keys: features are computed inside the kernels and never reach memory.

The gradient does not pass through them either: the kernels give the cotangents of the scores, half as wide, and two
matmuls take these to raw queries, raw keys and maps.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.log_gate_attention.problem import Act, Problem
from pallas_kernels.log_gate_attention.state import LinearState
from pallas_kernels.log_gate_attention.triton.attend import Operands, backward, forward
from pallas_kernels.log_gate_attention.triton.plan import Plan, plan, power
from pallas_kernels.numerics import ABSENT
from pallas_kernels.triton_launch import launch

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def _problem(q, k, v, k_map, act: Act) -> Problem:
    (B, T, N, X), (K, H), (S, _, E) = q.shape, v.shape[2:], k_map.shape
    return Problem(B, T, N, S, K, 2 * E, H, q.dtype, act=act, width=X)


def _shifts(x: Float[Array, "B T raw X"], a: Float[Array, "heads X E"], act: Act) -> Float[Array, "2 B T heads"]:
    from pallas_kernels.log_gate_attention.triton.features import shifts_kernel

    (B, T, raw, X), (heads, _, E) = x.shape, a.shape
    rows = 64
    return launch(
        shifts_kernel, x, a, out_shape=jax.ShapeDtypeStruct((2, B, T, heads), jnp.float32),
        grid=(-(-B * T // rows), heads, 1), num_warps=4, num_stages=1, tokens=B * T,
        HEADS=heads, GROUP=heads // raw, X=X, E=E, BX=power(X, 16), BE=power(E, 16), ROWS=rows,
        SOFTMAX=act == "softmax", PRECISION="ieee" if x.dtype == jnp.float32 else "tf32",
    )  # fmt: skip


def _prepared(q, k, c, q_map, k_map, act: Act, fused: bool) -> tuple[Operands, Array]:
    """What the kernels read, and key scales with those of the features in them.

    The fused one finds the scales of features itself, but for those that are part of the keys'.
    """
    q_map, k_map = q_map.astype(q.dtype), k_map.astype(q.dtype)
    unread = jnp.zeros((1,), jnp.float32)
    q_shift = unread if fused else _shifts(q, q_map, act)
    k_shift = unread if fused and act == "softmax" else _shifts(k, k_map, act)
    x = Operands(q, q_map, q_shift, k, k_map, k_shift)
    return x, c if act == "softmax" else jnp.where(c > ABSENT, c + x.k_shift[0], c)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def attend_mapped_by(q, k, v, g, c, state: LinearState, q_map, k_map, act: Act, how: Plan):
    """``attend_mapped`` with every size given."""
    x, c = _prepared(q, k, c, q_map, k_map, act, how.fused > 0)
    y, n, last = forward(_problem(q, k, v, k_map, act), how, x, v, g, c, state, True)
    if act == "exp" and not how.fused:
        n = jnp.where(n > ABSENT, n + x.q_shift[0], n)
    return y, n, last


def _attend_fwd(q, k, v, g, c, state, q_map, k_map, act, how):
    return attend_mapped_by(q, k, v, g, c, state, q_map, k_map, act, how), (q, k, v, g, c, state, q_map, k_map)


def _to_raw(ds: Float[Array, "B T heads E"], x: Float[Array, "B T raw X"], a: Float[Array, "heads X E"]):
    """Cotangents of ``x`` and of the map, of scores ``x·A`` in which consecutive heads share one of ``x``."""
    raw, (heads, X, E) = x.shape[2], a.shape
    ds = ds.reshape(*ds.shape[:2], raw, heads // raw, E)
    grouped = a.astype(x.dtype).reshape(raw, heads // raw, X, E)
    product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    dx = product("btrge,rgxe->btrx", ds, grouped).astype(x.dtype)
    return dx, product("btrge,btrx->rgxe", ds, x).reshape(a.shape).astype(a.dtype)


def _attend_bwd(act, how, saved, cotangents):
    q, k, v, g, c, state, q_map, k_map = saved
    x, c = _prepared(q, k, c, q_map, k_map, act, False)
    p = _problem(q, k, v, k_map, act)
    dq, dk, dv, dg, dc, dstate = backward(p, how, x, v, g, c, state, cotangents, True)
    dq, dq_map = _to_raw(dq, q, q_map)
    dk, dk_map = _to_raw(dk, k, k_map)
    return dq, dk, dv, dg, dc, dstate, dq_map, dk_map


attend_mapped_by.defvjp(_attend_fwd, _attend_bwd)


def attend_mapped(
    q: Float[Array, "B T N X"],
    k: Float[Array, "B T K X"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: LinearState,
    q_map: Float[Array, "N X E"],
    k_map: Float[Array, "S X E"],
    act: Act,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """The op as ``Implementation.attend_mapped``; the scale of an ``exp`` feature map is a constant to its gradient."""
    how = plan(_problem(q, k, v, k_map, act), target.current(), chunk)
    return attend_mapped_by(q, k, v, g, c, state, q_map, k_map, act, how)
