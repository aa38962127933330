"""The op on a GPU from features: launches of the Triton kernels, and its gradient."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.log_gate_attention.state import LinearState
from pallas_kernels.log_gate_attention.triton.plan import Launch, Plan, plan
from pallas_kernels.triton_launch import launch

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Exponents(NamedTuple):
    """What ``decay`` says of every place, and the states' scales."""

    past: Float[Array, "B S L"]
    rest: Float[Array, "B S L"]
    borders: Int[Array, "B S L"]
    hi: Float[Array, "B S L"]
    lo: Float[Array, "B S L"]
    top: Float[Array, "B S L"]
    scale: Float[Array, "B S chunks+1"]


def _like(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _problem(q: Array, k: Array, v: Array) -> Problem:
    (B, T, N, F), S, (K, H) = q.shape, k.shape[2], v.shape[2:]
    return Problem(B, T, N, S, K, F, H, q.dtype)


def _count(length: int, step: int) -> int:
    return -(-length // step)


def _run(kernel, p: Problem, C: int, how: Launch, arrays, out_shape, grid, **sizes):
    blocks = {"BF": how.features, "BH": how.width} | ({"HEADS": how.heads} if "HEADS" in kernel.arg_names else {})
    heads = {name: getattr(p, name) for name in ("N", "K") if name in kernel.arg_names}
    return launch(
        kernel, *arrays, out_shape=out_shape, grid=grid, num_warps=how.num_warps, num_stages=how.num_stages, T=p.T,
        chunks=_count(p.T, C), S=p.S, F=p.F, H=p.H, C=C, PRECISION="ieee" if p.dtype == jnp.float32 else "tf32",
        **heads, **blocks, **sizes,
    )  # fmt: skip


def exponents(p: Problem, C: int, g, c, m) -> Exponents:
    """All that the gates and key scales come to."""
    from pallas_kernels.log_gate_attention.triton.decay import exponents_kernel
    from pallas_kernels.log_gate_attention.triton.plan import power

    chunks = _count(p.T, C)
    place = (p.B, p.S, chunks * C)
    kinds = (jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32)
    out = [*(_like(place, kind) for kind in kinds), _like((p.B, p.S, chunks + 1))]
    at_once = min(power(chunks), 2048 // C)
    return Exponents(*launch(
        exponents_kernel, g, c, m, out_shape=out, grid=(p.B * p.S, 1, 1), num_warps=4, num_stages=1,
        T=p.T, chunks=chunks, S=p.S, C=C, CHUNKS=at_once,
    ))  # fmt: skip


def chunk_states(p: Problem, how: Plan, k, v, state: LinearState, sums: Exponents):
    """``(kvs, zs)``, the states before each chunk, and the last state."""
    from pallas_kernels.log_gate_attention.triton.forward import states_kernel

    shape = (p.B, p.S, _count(p.T, how.chunk), p.F)
    out = [_like((*shape, p.H), p.dtype), _like(shape), _like(state.kv.shape), _like(state.z.shape)]
    one = how.states
    grid = (p.B * p.S, _count(p.F, one.features), _count(p.H, one.width))
    kvs, zs, kv, z = _run(states_kernel, p, how.chunk, one, (k, v, state.kv, state.z, *sums), out, grid)
    return (kvs, zs), LinearState(kv, z, sums.scale[..., -1])


def forward(q, k, v, g, c, state: LinearState, normalize: bool, how: Plan):
    """``(y, n, den, final state)``; ``den`` is the rows' sum of weights relative to their scale in their chunk."""
    from pallas_kernels.log_gate_attention.triton.forward import fused_kernel, outputs_kernel

    p = _problem(q, k, v)
    sums = exponents(p, how.chunk, g, c, state.m)
    rows = (p.B, p.T, p.N)
    out = [_like((*rows, p.H), p.dtype), _like(rows), _like(rows)]
    if how.fused:
        out += [_like(state.kv.shape), _like(state.z.shape)]
        grid = (_count(p.H, how.forward.width), p.B * p.S, 1)
        arrays = (q, k, v, state.kv, state.z, *sums)
        y, n, den, kv, z = _run(fused_kernel, p, how.chunk, how.forward, arrays, out, grid, NORMALIZE=normalize)
        return y, n, den, LinearState(kv, z, sums.scale[..., -1])
    starts, last = chunk_states(p, how, k, v, state, sums)
    one = how.outputs
    parts = _count(p.N // p.S, one.heads) * _count(p.H, one.width)
    grid = (p.B * p.S, _count(p.T, how.chunk), parts)
    y, n, den = _run(
        outputs_kernel, p, how.chunk, one, (q, k, v, *sums, *starts), out, grid, NORMALIZE=normalize
    )  # fmt: skip
    return y, n, den, last


def backward(q, k, v, g, c, state: LinearState, den, cotangents, normalize: bool, how: Plan):
    """Cotangents of ``(q, k, v, g, c, state)``, from those of ``(y, n, state)``."""
    from pallas_kernels.log_gate_attention.triton.backward import keys_kernel, rows_kernel, state_cotangents_kernel

    dy, dn, dstate = cotangents
    p, C = _problem(q, k, v), how.chunk
    sums = exponents(p, C, g, c, state.m)
    starts, _ = chunk_states(p, how, k, v, state, sums)
    run = functools.partial(_run, NORMALIZE=normalize)

    chunks, blocks = _count(p.T, C), _count(p.N // p.S, how.rows.heads)
    places = (p.B, p.S, chunks * C)
    out = [_like(q.shape, p.dtype), _like(dn.shape), _like((blocks, *places)), _like((blocks, *places))]
    arrays = (q, k, v, dy, dn, den, *sums, *starts)
    dq, b, dg, dc = run(rows_kernel, p, C, how.rows, arrays, out, (p.B * p.S, chunks, blocks))

    one = how.cotangents
    grid = (p.B * p.S, _count(p.F, one.features), _count(p.H, one.width))
    out = [*(_like(x.shape, x.dtype) for x in starts), _like(state.kv.shape), _like(state.z.shape)]
    arrays = (q, dy, b, den, dstate.kv, dstate.z, *sums)
    *ends, dkv, dz = run(state_cotangents_kernel, p, C, one, arrays, out, grid)

    shared = p.S // p.K
    out = [_like(k.shape, k.dtype), _like((p.B, p.T, p.S, p.H), v.dtype if shared == 1 else jnp.float32)]
    out += [_like(places), _like(places)]
    arrays = (q, k, v, dy, b, den, *sums, *starts, *ends)
    dk, dv, dg_state, dc_state = run(keys_kernel, p, C, how.keys, arrays, out, (p.B * p.S, chunks, 1))
    if shared > 1:
        dv = jnp.sum(dv.reshape(p.B, p.T, p.K, shared, p.H), 3).astype(v.dtype)
    dg, dc = (jnp.moveaxis(jnp.sum(rows, 0) + one, 1, 2)[:, : p.T] for rows, one in ((dg, dg_state), (dc, dc_state)))
    return dq, dk, dv, dg, dc, LinearState(dkv, dz, jnp.zeros_like(state.m))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_by(q, k, v, g, c, state: LinearState, normalize: bool, how: Plan):
    """``attend`` with every size given."""
    y, n, _, state = forward(q, k, v, g, c, state, normalize, how)
    return y, n, state


def _attend_fwd(q, k, v, g, c, state, normalize, how):
    y, n, den, last = forward(q, k, v, g, c, state, normalize, how)
    return (y, n, last), (q, k, v, g, c, state, den)


def _attend_bwd(normalize, how, saved, cotangents):
    return backward(*saved, cotangents, normalize, how)


attend_by.defvjp(_attend_fwd, _attend_bwd)


def attend(
    q: Float[Array, "B T N F"],
    k: Float[Array, "B T S F"],
    v: Float[Array, "B T K H"],
    g: Float[Array, "B T S"],
    c: Float[Array, "B T S"],
    state: LinearState,
    normalize: bool,
    chunk: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """The op as ``Implementation.attend``; ``plan`` chooses tiles, and chunks of at most ``chunk`` tokens."""
    return attend_by(q, k, v, g, c, state, normalize, plan(_problem(q, k, v), target.current(), chunk))
