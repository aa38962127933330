"""The op, and the states that its gradient starts from."""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.log_gate_attention.pallas_gpu.chunk import Chunk, loop
from pallas_kernels.log_gate_attention.pallas_gpu.decay import decay_of, exponents_of, next_of, unscale
from pallas_kernels.log_gate_attention.pallas_gpu.features import features_of, maps_first
from pallas_kernels.log_gate_attention.pallas_gpu.matmul import sum_of
from pallas_kernels.log_gate_attention.pallas_gpu.plan import Plan
from pallas_kernels.log_gate_attention.pallas_gpu.state import State, advance, load_state, store_state
from pallas_kernels.log_gate_attention.state import SMALLEST, LinearState
from pallas_kernels.numerics import ABSENT, EMPTY
from pallas_kernels.pallas_triton import array, dot, launch


def _forward_kernel(q_ref, k_ref, v_ref, g_ref, c_ref, kv_ref, z_ref, m_ref, *refs, plan: Plan):
    (q_maps, k_maps), refs = maps_first(refs, plan)
    y_ref, n_ref, *out_refs = refs
    b, s, columns = pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * plan.block, plan.block)
    rows, values = plan.N // plan.S, s // (plan.S // plan.K)

    def body(i, state: State) -> State:
        chunk = Chunk(plan, b, i)
        k = features_of(chunk, k_ref, k_maps, s, values)
        g, c = chunk.load(g_ref, s), chunk.load(c_ref, s, other=EMPTY)
        if k.scale is not None:
            c = jnp.where(c > ABSENT, c + k.scale, EMPTY)
            chunk.store(out_refs[3], c, s)
        e = exponents_of(g, c)
        decay = decay_of(e, state.m)

        def read(r, carry):
            n = s * rows + r
            # Keys and values are loaded anew for each head: kept as matmul operands they take half of the registers.
            v = chunk.load(v_ref, values, columns)
            k = features_of(chunk, k_ref, k_maps, s, values).parts
            q = features_of(chunk, q_ref, q_maps, n, n)
            weights = sum_of(dot(a, b, (1, 1)) for a, b in zip(q.parts, k, strict=True)) * decay.pair
            on_z = sum_of(jnp.sum(a.astype(jnp.float32) * z[None, :], 1) for a, z in zip(q.parts, state.z, strict=True))
            den = jnp.sum(weights, 1) + decay.carried * on_z
            nonempty = den > SMALLEST
            safe = jnp.where(nonempty, den, 1.0)
            normalizer = decay.m + jnp.log(safe)
            normalizer = normalizer if q.scale is None else normalizer + q.scale
            chunk.store(n_ref, jnp.where(nonempty, normalizer, EMPTY), n)
            on_state = sum_of(dot(a, kv.astype(a.dtype), (1, 1)) for a, kv in zip(q.parts, state.kv, strict=True))
            num = decay.carried[:, None] * on_state + dot(weights.astype(v.dtype), v)
            y = jnp.where(nonempty[:, None], num / safe[:, None], 0.0) if plan.normalize else unscale(num, decay)
            chunk.store(y_ref, y, n, columns)
            return carry

        loop(rows, read, ())
        v = chunk.load(v_ref, values, columns)
        return advance(state, k.parts, v, next_of(e, g, state.m))

    state = load_state(kv_ref, z_ref, m_ref, plan, columns, b, s)
    store_state(out_refs[:3], loop(plan.count, body, state), columns, b, s)


def states_kernel(k_ref, v_ref, g_ref, c_ref, kv_ref, z_ref, m_ref, *refs, plan: Plan):
    (_, k_maps), refs = maps_first(refs, plan)
    b, s, columns = pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * plan.block, plan.block)
    values = s // (plan.S // plan.K)

    def body(i, state: State) -> State:
        store_state(refs, state, columns, b, s, i)
        chunk = Chunk(plan, b, i)
        k = features_of(chunk, k_ref, k_maps, s, values)
        g = chunk.load(g_ref, s)
        e = exponents_of(g, chunk.load(c_ref, s, other=EMPTY))
        return advance(state, k.parts, chunk.load(v_ref, values, columns), next_of(e, g, state.m))

    loop(plan.count, body, load_state(kv_ref, z_ref, m_ref, plan, columns, b, s))


def forward(plan: Plan, q, k, v, g, c, state: LinearState, maps):
    """The op's results, and the key scales with those that the feature map adds."""
    B, T, N, S, H = plan.B, plan.T, plan.N, plan.S, plan.H
    outputs = (
        array(B, T, N, H, dtype=v.dtype), array(B, T, N),
        array(B, S, plan.parts, H, plan.width), array(B, S, *plan.shape), array(B, S),
        *([array(B, T, S)] if plan.act == "exp" else []),
    )  # fmt: skip
    inputs = (q, k, v, g, c, state.kv, state.z, state.m, *(x.astype(q.dtype) for x in maps))
    y, n, kv, z, m, *scales = launch(_forward_kernel, plan, (B, S, H // plan.block), inputs, outputs)
    return (y, n, LinearState(kv, z, m)), scales[0] if scales else c
