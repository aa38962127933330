"""The cotangents: of queries, of states from the last to the first, of keys, of values with gates and scales."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.log_gate_attention.pallas_gpu.chunk import Chunk, loop, places, times_state
from pallas_kernels.log_gate_attention.pallas_gpu.decay import decay_of, exponents_of, next_of
from pallas_kernels.log_gate_attention.pallas_gpu.features import features_of, maps_first, sum_maps, through_map
from pallas_kernels.log_gate_attention.pallas_gpu.forward import states_kernel
from pallas_kernels.log_gate_attention.pallas_gpu.matmul import in_two, sum_of
from pallas_kernels.log_gate_attention.pallas_gpu.plan import Plan
from pallas_kernels.log_gate_attention.pallas_gpu.state import load_parts, store_parts
from pallas_kernels.log_gate_attention.state import SMALLEST, LinearState
from pallas_kernels.numerics import EMPTY
from pallas_kernels.pallas_triton import array, dot, launch


def _state_cotangents_kernel(
    q_ref, dy_ref, a_ref, b_ref, g_ref, c_ref, m_ref, dkv_ref, dz_ref, *refs, plan: Plan
):  # fmt: skip
    (q_maps, _), refs = maps_first(refs, plan)
    dkv_ends, dz_ends, dkv_start, dz_start = refs
    b, s, columns = pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * plan.block, plan.block)
    rows = plan.N // plan.S

    def body(back, carry):
        i = plan.count - 1 - back
        store_parts(dkv_ends, carry[0], b, s, i, (columns, slice(None)))
        store_parts(dz_ends, carry[1], b, s, i, (slice(None),))
        chunk = Chunk(plan, b, i)
        g, m = chunk.load(g_ref, s), m_ref[b, s, i]
        e = exponents_of(g, chunk.load(c_ref, s, other=EMPTY))
        decay, keep = decay_of(e, m), next_of(e, g, m).keep

        def read(r, carry):
            n = s * rows + r
            q = features_of(chunk, q_ref, q_maps, n, n).parts
            dy = chunk.load(dy_ref, n, columns)
            pulled = (decay.carried * chunk.load(a_ref, n))[:, None] * dy.astype(jnp.float32)
            on_z = (decay.carried * chunk.load(b_ref, n))[:, None]
            dkv, dz = carry
            dz = tuple(x + jnp.sum(a.astype(jnp.float32) * on_z, 0) for x, a in zip(dz, q, strict=True))
            for part in in_two(pulled, dy.dtype):
                dkv = tuple(x + dot(part, a, (0, 0)) for x, a in zip(dkv, q, strict=True))
            return dkv, dz

        return loop(rows, read, jax.tree.map(lambda x: keep * x, carry))

    carry = (
        load_parts(dkv_ref, plan, b, s, (columns, slice(None))),
        load_parts(dz_ref, plan, b, s, (slice(None),)),
    )
    dkv, dz = loop(plan.count, body, carry)
    store_parts(dkv_start, dkv, b, s, (columns, slice(None)))
    store_parts(dz_start, dz, b, s, (slice(None),))


def _queries_kernel(
    q_ref, k_ref, v_ref, dy_ref, dn_ref, g_ref, c_ref, kv_ref, z_ref, m_ref, *refs, plan: Plan
):  # fmt: skip
    (q_maps, k_maps), refs = maps_first(refs, plan)
    dq_ref, a_ref, b_ref, since_ref, *dmaps_ref = refs
    b, n = pl.program_id(0), pl.program_id(1)
    s = n // (plan.N // plan.S)
    values = s // (plan.S // plan.K)

    def body(i, cut=0, dmap=()):
        chunk = Chunk(plan, b, i)
        k = features_of(chunk, k_ref, k_maps, s, values).parts
        q = features_of(chunk, q_ref, q_maps, n, n)
        e = exponents_of(chunk.load(g_ref, s), chunk.load(c_ref, s, other=EMPTY))
        decay = decay_of(e, m_ref[b, s, i])
        dy, dn = chunk.load(dy_ref, n, slice(None)), chunk.load(dn_ref, n)
        scores = sum_of(dot(x, y, (1, 1)) for x, y in zip(q.parts, k, strict=True)) * decay.pair
        on_values = dot(dy, chunk.load(v_ref, values, slice(None)), (1, 1))
        den, y_dy, on_state = jnp.sum(scores, 1), jnp.sum(scores * on_values, 1), []
        for p, part in enumerate(q.parts):
            wide = part.astype(jnp.float32)
            on_state.append(times_state(chunk, dy_ref, n, kv_ref, (b, s, i, p)))
            den += decay.carried * jnp.sum(wide * z_ref[b, s, i, p][None, :], 1)
            y_dy += decay.carried * jnp.sum(wide * on_state[p], 1)
        nonempty = den > SMALLEST
        inverse = jnp.where(nonempty, 1.0 / jnp.where(nonempty, den, 1.0), 0.0)
        if plan.normalize:
            on_sum, on_weight = inverse, (dn - y_dy * inverse) * inverse
        else:
            half = jnp.where(decay.nonempty, jnp.exp(0.5 * decay.m), 0.0)
            on_sum, on_weight = half * half, dn * inverse
        chunk.store(a_ref, on_sum, n)
        chunk.store(b_ref, on_weight, n)

        dscores = decay.pair * (on_sum[:, None] * on_values + on_weight[:, None])
        dscores = dscores.astype(plan.dtype)
        dq, since = [], jnp.zeros((plan.C,), jnp.float32)
        for p, part in enumerate(q.parts):
            on_part = on_sum[:, None] * on_state[p] + on_weight[:, None] * z_ref[b, s, i, p][None, :]
            on_part = decay.carried[:, None] * on_part
            since += jnp.sum(part.astype(jnp.float32) * on_part, 1)
            dq.append(dot(dscores, k[p]) + on_part)
        chunk.store(since_ref, since, n)
        if plan.act is None:
            for p in range(plan.parts):
                chunk.store(dq_ref, dq[p], n, pl.ds(p * plan.width, plan.width))
            return ()
        return through_map(chunk, q, dq, q_ref, q_maps, n, n, dq_ref, cut, dmap)

    if plan.act is None:
        body(pl.program_id(2))
    else:
        sum_maps(plan, body, dmaps_ref[0], b, n)


def _keys_kernel(
    q_ref, k_ref, v_ref, dy_ref, a_ref, b_ref, g_ref, c_ref, m_ref, dkv_ref, dz_ref, *refs, plan: Plan
):  # fmt: skip
    (q_maps, k_maps), refs = maps_first(refs, plan)
    dk_ref, filled_ref, *dmaps_ref = refs
    b, s, which = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, values = plan.N // plan.S, s // (plan.S // plan.K)

    def body(i, parts: tuple[int, ...]):
        """Cotangents of some parts of a chunk's keys."""
        chunk = Chunk(plan, b, i)
        g, c, m = chunk.load(g_ref, s), chunk.load(c_ref, s, other=EMPTY), m_ref[b, s, i]
        e = exponents_of(g, c)
        pair = decay_of(e, m).pair

        def read(r, dk):
            n = s * rows + r
            dy, on_sum = chunk.load(dy_ref, n, slice(None)), chunk.load(a_ref, n)[:, None]
            on_values = dot(dy, chunk.load(v_ref, values, slice(None)), (1, 1))
            dscores = (pair * (on_sum * on_values + chunk.load(b_ref, n)[:, None])).astype(plan.dtype)
            q = features_of(chunk, q_ref, q_maps, n, n).parts
            return tuple(part + dot(dscores, q[p], (0, 0)) for part, p in zip(dk, parts, strict=True))

        dk = list(loop(rows, read, tuple(jnp.zeros((plan.C, plan.width), jnp.float32) for _ in parts)))
        # The next state is filled too.
        take = next_of(e, g, m).take[:, None]
        k = features_of(chunk, k_ref, k_maps, s, values)
        filled = jnp.zeros((plan.C,), jnp.float32)
        for at, p in enumerate(parts):
            on_part = take * (times_state(chunk, v_ref, values, dkv_ref, (b, s, i, p)) + dz_ref[b, s, i, p][None, :])
            filled += jnp.sum(k.parts[p].astype(jnp.float32) * on_part, 1)
            dk[at] += on_part
        return chunk, k, dk, filled

    if plan.act is None:
        total = jnp.zeros((plan.C,), jnp.float32)
        for p in range(plan.parts):
            chunk, _, (dk,), filled = body(which, (p,))
            chunk.store(dk_ref, dk, s, pl.ds(p * plan.width, plan.width))
            total += filled
        Chunk(plan, b, which).store(filled_ref, total, s)
        return

    def mapped(i, cut, dmap):
        chunk, k, dk, filled = body(i, (0, 1))
        chunk.store(filled_ref, filled, s)
        return through_map(chunk, k, dk, k_ref, k_maps, s, values, dk_ref, cut, dmap)

    sum_maps(plan, mapped, dmaps_ref[0], b, s)


def _values_kernel(
    q_ref, k_ref, v_ref, dy_ref, a_ref, b_ref, g_ref, c_ref, m_ref, dkv_ref, filled_ref, since_ref, kept_ref, *refs,
    plan: Plan,
):  # fmt: skip
    (q_maps, k_maps), (dv_ref, dg_ref, dc_ref) = maps_first(refs, plan)
    b, s, i = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, values = plan.N // plan.S, s // (plan.S // plan.K)
    chunk = Chunk(plan, b, i)
    g, m = chunk.load(g_ref, s), m_ref[b, s, i]
    e = exponents_of(g, chunk.load(c_ref, s, other=EMPTY))
    pair = decay_of(e, m).pair
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)

    def read(r, carry):
        dv, exponent = carry
        n = s * rows + r
        dy, on_sum = chunk.load(dy_ref, n, slice(None)), chunk.load(a_ref, n)[:, None]
        on_values = dot(dy, chunk.load(v_ref, values, slice(None)), (1, 1))
        q = features_of(chunk, q_ref, q_maps, n, n).parts
        k = features_of(chunk, k_ref, k_maps, s, values).parts
        scores = sum_of(dot(x, y, (1, 1)) for x, y in zip(q, k, strict=True)) * pair
        exponent += scores * (on_sum * on_values + chunk.load(b_ref, n)[:, None])
        return dv + dot((scores * on_sum).astype(plan.dtype), dy, (0, 0)), exponent

    dv, exponent = loop(rows, read, (zeros((plan.C, plan.H)), zeros((plan.C, plan.C))))

    following = next_of(e, g, m)
    place = places(plan.C)
    last = place == plan.C - 1
    # The last row's exponents are also those of the next state.
    exponent += jnp.where(last[:, None], chunk.load(filled_ref, s)[None, :], 0.0)
    since = chunk.load(since_ref, s) + jnp.where(last, following.keep * kept_ref[b, s, i], 0.0)
    chunk.store(dc_ref, jnp.sum(exponent, 0), s)
    # A gate parts the keys before it from the rows after it: sums of pairs as they stand, not of their differences.
    before = (place[:, None] < place[None, :]).astype(jnp.float32)
    parted = jnp.where(place[:, None] >= place[None, :], dot(exponent, before) + since[:, None], 0.0)
    chunk.store(dg_ref, jnp.sum(parted, 0), s)

    for p, part in enumerate(features_of(chunk, k_ref, k_maps, s, values).parts):
        taken = following.take[:, None] * part.astype(jnp.float32)
        dv += dot(taken.astype(plan.dtype), dkv_ref[b, s, i, p].astype(plan.dtype), (1, 1))
    chunk.store(dv_ref, dv, s, slice(None))


def backward(plan: Plan, saved, cotangents):
    q, k, v, g, c, state, wide_maps = saved
    dy, dn, dstate = cotangents
    maps = tuple(x.astype(q.dtype) for x in wide_maps)
    B, T, N, S, K, H = plan.B, plan.T, plan.N, plan.S, plan.K, plan.H
    grid, runs = (B, S, H // plan.block), -(-plan.count // plan.run)

    ends = (
        array(B, S, plan.count, plan.parts, H, plan.width), array(B, S, plan.count, *plan.shape),
    )  # fmt: skip
    states = launch(
        states_kernel, plan, grid, (k, v, g, c, state.kv, state.z, state.m, *maps),
        (*ends, array(B, S, plan.count)),
    )  # fmt: skip
    dq, a, b, since, *dq_maps = launch(
        _queries_kernel, plan, (B, N, runs * plan.cuts), (q, k, v, dy, dn, g, c, *states, *maps),
        (
            array(*q.shape, dtype=q.dtype), array(B, T, N), array(B, T, N), array(B, T, N),
            *(array(B, runs, *x.shape) for x in maps[:1]),
        ),
    )  # fmt: skip
    *dends, dkv, dz = launch(
        _state_cotangents_kernel, plan, grid, (q, dy, a, b, g, c, states[2], dstate.kv, dstate.z, *maps),
        (*ends, array(B, S, plan.parts, H, plan.width), array(B, S, *plan.shape)),
    )  # fmt: skip
    # Where state heads share a key/value head, each leaves a cotangent of its own, and their sum is rounded once.
    shared = q.dtype if S == K else jnp.float32
    dk, filled, *dk_maps = launch(
        _keys_kernel, plan, (B, S, runs * plan.cuts), (q, k, v, dy, a, b, g, c, states[2], *dends, *maps),
        (
            array(B, T, S, k.shape[-1], dtype=shared if maps else k.dtype), array(B, T, S),
            *(array(B, runs, *x.shape) for x in maps[1:]),
        ),
    )  # fmt: skip
    since = jnp.sum(since.reshape(B, T, S, N // S), -1)
    kept = jnp.sum(states[0] * dends[0], (-3, -2, -1))
    kept += jnp.sum(states[1] * dends[1], (-2, -1))
    dv, dg, dc = launch(
        _values_kernel, plan, (B, S, plan.count),
        (q, k, v, dy, a, b, g, c, states[2], dends[0], filled, since, kept, *maps),
        (array(B, T, S, H, dtype=shared), array(B, T, S), array(B, T, S)),
    )  # fmt: skip
    if S != K:
        dv = jnp.sum(dv.reshape(B, T, K, S // K, -1), 3).astype(v.dtype)
        dk = jnp.sum(dk.reshape(B, T, K, S // K, -1), 3).astype(k.dtype) if maps else dk
    dmaps = tuple(
        jnp.sum(part, (0, 1)).astype(x.dtype) for part, x in zip((*dq_maps, *dk_maps), wide_maps, strict=True)
    )
    return dq, dk, dv, dg, dc, LinearState(dkv, dz, jnp.zeros_like(dstate.m)), dmaps
