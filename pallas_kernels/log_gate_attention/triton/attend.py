"""The op on a GPU from features: launches of the Triton kernels, and its gradient."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.log_gate_attention.problem import Problem
from pallas_kernels.log_gate_attention.state import LinearState
from pallas_kernels.log_gate_attention.triton.plan import Launch, Plan, plan, power
from pallas_kernels.triton_launch import launch

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class Decays(NamedTuple):
    """What ``decay`` says of every place and chunk."""

    hi: Float[Array, "B S L"]
    lo: Float[Array, "B S L"]
    M: Float[Array, "B S L"]
    own: Float[Array, "B S L"]
    start: Int[Array, "B S L"]
    reads: Float[Array, "B S L"]
    take: Float[Array, "B S L"]
    keep: Float[Array, "B S chunks"]
    m_last: Float[Array, "B S"]


def _like(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _count(length: int, step: int) -> int:
    return -(-length // step)


class Operands(NamedTuple):
    """Queries and keys: features, whose maps and shifts are not read, or raw with what ``features`` says of a map."""

    q: Float[Array, "B T N F"] | Float[Array, "B T N X"]
    q_map: Float[Array, "N X E"] | Float[Array, "1"]
    q_shift: Float[Array, "2 B T N"] | Float[Array, "1"]
    k: Float[Array, "B T S F"] | Float[Array, "B T K X"]
    k_map: Float[Array, "S X E"] | Float[Array, "1"]
    k_shift: Float[Array, "2 B T S"] | Float[Array, "1"]


def _run(kernel, p: Problem, C: int, how: Launch, arrays, out_shape, grid, **sizes):
    given = {"N": p.N, "K": p.K, "HEADS": how.heads, "PLACES": min(C, how.places), "BF": how.features, "BH": how.width}
    given |= {"PARTS": _parts(p), "PRECISION": _precision(p)}
    given |= {"X": p.width or 0, "BX": power(p.width or 16, 16), "SOFTMAX": p.act == "softmax"} | sizes
    return launch(
        kernel, *arrays, out_shape=out_shape, grid=grid, num_warps=how.num_warps, num_stages=how.num_stages, T=p.T,
        chunks=_count(p.T, C), S=p.S, F=p.F, H=p.H, C=C, **{k: v for k, v in given.items() if k in kernel.arg_names},
    )  # fmt: skip


def _precision(p: Problem) -> str:
    return "ieee" if p.dtype == jnp.float32 else "tf32"


def _parts(p: Problem) -> int:
    """Of the states that a gradient reads: rounded to a matmul's operand and, if that is less than fp32, the rest."""
    return 1 if p.dtype == jnp.float32 else 2


def _blocks(p: Problem, how: Launch) -> tuple[int, int, int]:
    """A program per batch, state head and ``[BF, BH]`` block of a state, which lies in one half of mapped features."""
    halves = 2 if p.act else 1
    return p.B * p.S, halves * _count(p.F // halves, how.features), _count(p.H, how.width)


def decays(p: Problem, C: int, g, c, m) -> Decays:
    """All that the gates and key scales come to."""
    from pallas_kernels.log_gate_attention.triton.decay import decays_kernel

    chunks = _count(p.T, C)
    out = [_like((p.B, p.S, chunks * C), jnp.int32 if name == "start" else jnp.float32) for name in Decays._fields[:7]]
    out += [_like((p.B, p.S, chunks)), _like((p.B, p.S))]
    return Decays(*launch(
        decays_kernel, g, c, m, out_shape=out, grid=(p.B * p.S, 1, 1), num_warps=4, num_stages=1,
        T=p.T, chunks=chunks, S=p.S, C=C, CHUNKS=min(power(chunks), 1024 // C),
    ))  # fmt: skip


class States(NamedTuple):
    """States before each chunk, or cotangents of those after it: rounded, what rounding took, and ``z``."""

    kvs: Float[Array, "parts B S chunks F H"]
    zs: Float[Array, "B S chunks F"]


def _states(p: Problem, C: int, parts: int) -> list[jax.ShapeDtypeStruct]:
    shape = (p.B, p.S, _count(p.T, C), p.F)
    return [_like((parts, *shape, p.H), p.dtype), _like(shape)]


def chunk_states(p: Problem, how: Plan, x: Operands, v, state: LinearState, by: Decays, parts: int):
    """The states before each chunk, and the last one."""
    from pallas_kernels.log_gate_attention.triton.forward import states_kernel

    out = [*_states(p, how.chunk, parts), _like(state.kv.shape), _like(state.z.shape)]
    arrays = (*x[3:], v, state.kv, state.z, by.take, by.keep)
    grid = _blocks(p, how.states)
    kvs, zs, kv, z = _run(states_kernel, p, how.chunk, how.states, arrays, out, grid, PARTS=parts)
    return States(kvs, zs), LinearState(kv, z, by.m_last)


def forward(p: Problem, how: Plan, x: Operands, v, g, c, state: LinearState, normalize: bool):
    """``(y, n, final state)``."""
    from pallas_kernels.log_gate_attention.triton.forward import fused_kernel, outputs_kernel
    from pallas_kernels.log_gate_attention.triton.fused_mapped import fused_mapped_kernel

    rows = (p.B, p.T, p.N)
    out = [_like((*rows, p.H), p.dtype), _like(rows)]
    run = functools.partial(_run, NORMALIZE=normalize)
    if how.fused:
        by = decays(p, how.fused, g, c, state.m)
        out += [_like(state.kv.shape), _like(state.z.shape)]
        grid = (_count(p.H, how.forward.width), p.B * p.S, 1)
        kernel, given = (fused_mapped_kernel, (x.q, x.q_map, *x[3:])) if p.act else (fused_kernel, (x.q, x.k))
        y, n, kv, z = run(kernel, p, how.fused, how.forward, (*given, v, state.kv, state.z, *by[:8]), out, grid)
        return y, n, LinearState(kv, z, by.m_last)
    by = decays(p, how.chunk, g, c, state.m)
    starts, last = chunk_states(p, how, x, v, state, by, parts=1)
    parts = _count(p.N // p.S, how.outputs.heads) * _count(p.H, how.outputs.width)
    grid = (p.B * p.S, _count(p.T, how.chunk), parts)
    y, n = run(outputs_kernel, p, how.chunk, how.outputs, (*x, v, *by[:6], *starts), out, grid)
    return y, n, last


def backward(p: Problem, how: Plan, x: Operands, v, g, c, state: LinearState, cotangents, normalize: bool):
    """Cotangents of queries, keys (of their scores, where there is a map), ``(v, g, c, state)``."""
    from pallas_kernels.log_gate_attention.triton.backward import cotangents_kernel, keys_kernel, rows_kernel

    dy, dn, dstate = cotangents
    C, parts = how.chunk, _parts(p)
    by = decays(p, C, g, c, state.m)
    starts, _ = chunk_states(p, how, x, v, state, by, parts)
    chunks, E = _count(p.T, C), p.F // 2 if p.act else p.F
    places = (p.B, p.S, chunks * C)

    blocks = _count(p.N // p.S, how.rows.heads) * _count(C, how.rows.places)
    out = [_like((p.B, p.T, p.N, E), p.dtype), *[_like(dn.shape)] * 2, *[_like((blocks, *places))] * 2]
    arrays = (*x, v, dy, dn, *by[:6], *starts)
    grid = (p.B * p.S, chunks, blocks)
    dq, a, b, dg_rows, dc_rows = _run(rows_kernel, p, C, how.rows, arrays, out, grid, NORMALIZE=normalize)

    grid = _blocks(p, how.cotangents)
    out = [*_states(p, C, parts), _like(state.kv.shape), _like(state.z.shape), _like((*grid[1:], p.B, p.S, chunks))]
    arrays = (*x[:3], dy, a, b, dstate.kv, dstate.z, by.reads, by.keep, *starts)
    *ends, dkv, dz, kept = _run(cotangents_kernel, p, C, how.cotangents, arrays, out, grid)

    blocks, shared = _count(C, how.keys.places), p.S // p.K
    out = [_like((p.B, p.T, p.S, E), p.dtype), _like((p.B, p.T, p.S, p.H), p.dtype if shared == 1 else jnp.float32)]
    out += [_like((blocks, *places)), _like(places)]
    arrays = (*x, v, dy, a, b, by.hi, by.lo, by.M, by.start, by.take, *ends)
    dk, dv, dg_keys, dc_keys = _run(keys_kernel, p, C, how.keys, arrays, out, (p.B * p.S, chunks, blocks))
    if shared > 1:
        dv = jnp.sum(dv.reshape(p.B, p.T, p.K, shared, p.H), 3).astype(p.dtype)
    dg = jnp.sum(dg_rows, 0) + jnp.sum(dg_keys, 0) + jnp.repeat(jnp.sum(kept, (0, 1)), C, -1)
    dg, dc = (jnp.moveaxis(x, 1, 2)[:, : p.T] for x in (dg, jnp.sum(dc_rows, 0) + dc_keys))
    return dq, dk, dv, dg, dc, LinearState(dkv, dz, jnp.zeros_like(state.m))


def _given(q, k, v) -> tuple[Problem, Operands]:
    """Features as they are."""
    (B, T, N, F), S, (K, H) = q.shape, k.shape[2], v.shape[2:]
    unread = jnp.zeros((1,), q.dtype)
    return Problem(B, T, N, S, K, F, H, q.dtype), Operands(q, unread, unread, k, unread, unread)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_by(q, k, v, g, c, state: LinearState, normalize: bool, how: Plan):
    """``attend`` with every size given."""
    p, x = _given(q, k, v)
    return forward(p, how, x, v, g, c, state, normalize)


def _attend_fwd(q, k, v, g, c, state, normalize, how):
    return attend_by(q, k, v, g, c, state, normalize, how), (q, k, v, g, c, state)


def _attend_bwd(normalize, how, saved, cotangents):
    q, k, v, g, c, state = saved
    p, x = _given(q, k, v)
    return backward(p, how, x, v, g, c, state, cotangents, normalize)


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
    return attend_by(q, k, v, g, c, state, normalize, plan(_given(q, k, v)[0], target.current(), chunk))
