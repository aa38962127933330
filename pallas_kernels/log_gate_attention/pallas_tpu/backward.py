"""The backward kernel: from the last chunk to the first, carrying the cotangent of the state."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.log_gate_attention.pallas_tpu.chunk import Chunk, begin, inputs, inverse, state_shapes
from pallas_kernels.log_gate_attention.pallas_tpu.decay import Decay, decays
from pallas_kernels.log_gate_attention.pallas_tpu.features import Features, to_raw
from pallas_kernels.log_gate_attention.pallas_tpu.layout import Blocks, Plan, call
from pallas_kernels.log_gate_attention.pallas_tpu.matmul import Stack, dot, dot_exactly, dot_finely, stack
from pallas_kernels.log_gate_attention.pallas_tpu.rows import columns, places, row, stacked
from pallas_kernels.numerics import ABSENT
from pallas_kernels.staggered import staggered

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class _Held(NamedTuple):
    """What all query heads of a chunk meet."""

    decay: Decay
    with_q: Stack  # keys, z
    with_dy: Stack  # values, kv
    keys: Float[Array, "F C"]
    z: Float[Array, "F 1"]


class _Met(NamedTuple):
    """A query head and what it has met."""

    q: Features
    dy: Float[Array, "C H"]
    by_q: Array
    by_dy: Array


class _OfHead(NamedTuple):
    """What one query head adds to each cotangent; fp32."""

    q: Float[Array, "F C"]
    k: Float[Array, "C F"]
    v: Float[Array, "C H"]
    kv: Float[Array, "F H"]
    z: Float[Array, "1 F"]
    exponent: Float[Array, "C C"]  # of each pair, keys as rows
    since: Float[Array, "1 C"]  # of the carried state's decay to each query


class _OfStateHead(NamedTuple):
    """Cotangents of what belongs to a state head; fp32."""

    k: Float[Array, "C X"]
    v: Float[Array, "C H"]
    kv: Float[Array, "F H"]
    z: Float[Array, "1 F"]
    g: Float[Array, "1 C"]
    c: Float[Array, "1 C"]
    map: Float[Array, "half X"] | None


def _of_head(held: _Held, met: _Met, dn: Float[Array, "1 C"], normalize: bool) -> _OfHead:
    """Cotangents of one query head's ``y`` and ``n``.

    A pair's weight has the cotangent ``a_i (dy_i·v_j) + b_i``: with ``normalize`` ``a = 1/den`` and
    ``b = (dn - y·dy) / den``, without it ``a = e^level`` and ``b = dn / den``. Where a state holds little but one token
    the two nearly cancel, so ``kv`` is not rounded here; nor is what goes to the cotangent of ``kv``, which cancels
    with that of ``z`` in the gates' cotangents of earlier chunks.
    """
    decay, q, dy = held.decay, met.q, met.dy
    wide = q.columns.astype(jnp.float32)
    scores, reads_z = held.with_q.split(met.by_q)
    on_values, on_state = held.with_dy.split(met.by_dy)
    scores *= decay.pair
    reads_z = decay.carried * reads_z[:1]
    reads_kv = decay.carried * jnp.sum(wide * on_state, 0, keepdims=True)
    den = jnp.sum(scores, 0, keepdims=True) + reads_z
    over = inverse(den)
    if normalize:
        y_dy = (jnp.sum(scores * on_values, 0, keepdims=True) + reads_kv) * over
        a, b = over, (dn - y_dy) * over
    else:
        half = jnp.exp(0.5 * decay.level)
        a, b = half * half, dn * over

    weights = a * on_values + b
    dscores = decay.pair * weights
    of_q = stack(dy.dtype, (dscores, 1), (stacked(decay.carried * b), 3))
    of_dy = stack(dy.dtype, (scores * a, 1), (wide * (decay.carried * a), 2))
    to_k, to_z = of_q.split(q.summed_by(of_q.value))
    to_v, to_kv = of_dy.split(dot(of_dy.value, dy))
    return _OfHead(
        q=dot(held.keys, dscores.astype(dy.dtype)) + decay.carried * (a * on_state + b * held.z),
        k=to_k,
        v=to_v,
        kv=to_kv,
        z=to_z[:1],
        exponent=scores * weights,
        since=a * reads_kv + b * reads_z,
    )


def _of_gates(exponent: Float[Array, "C C"], since: Float[Array, "1 C"]) -> Float[Array, "1 C"]:
    """``dg_t = Σ_{i ≥ t} (Σ_{j < t} exponent_ji + since_i)``, summed as it stands.

    The difference of sums over keys and over queries is the same number, lost to rounding where gates forget hard.
    """
    C = since.shape[1]
    i, t = places(C)
    from_there = jnp.where(i >= t, 1.0, 0.0).astype(jnp.bfloat16)
    sums = dot_exactly(jnp.concatenate([exponent, stacked(since)], 0), from_there)
    return jnp.sum(jnp.where(i < t, sums[:C], 0.0), 0, keepdims=True) + sums[C : C + 1]


def log_gate_backward(plan: Plan, ins: dict, outs: dict, sums: dict) -> None:
    """Cotangents of a chunk's inputs; at the first chunk those of the initial state."""
    step, turn = pl.program_id(2), pl.program_id(3)
    states = {name: sums[name] for name in ("kv", "z")}
    begin(plan, ins, states, "d")
    if plan.act is not None:

        @pl.when((step == 0) & (turn == 0))
        def _() -> None:
            for name in ("q_map", "k_map"):
                outs[name][...] = jnp.zeros(outs[name].shape, jnp.float32)

    chunks = [Chunk(plan, ins, plan.chunks - 1 - step, head) for head in range(plan.M)]
    given, held = [], []
    for head, chunk in enumerate(chunks):
        key, kv, z = chunk.key(), ins["kv"][0, head, 0], ins["z"][0, head, 0]
        decay = decays(chunk.gates(), chunk.key_scales(key), ins["m"][0, head, 0])
        with_q = stack(plan.dtype, (key.rows, 1), (stacked(z), 3))
        with_dy = stack(plan.dtype, (chunk.values(), 1), (kv, 2))
        given.append((key, kv, z))
        held.append(_Held(decay, with_q, with_dy, key.columns, columns(z)[0]))

    def query(place: int) -> Features:
        return chunks[place // plan.R].query(place % plan.R)

    def meet(place: int, q: Features) -> _Met:
        head, r = divmod(place, plan.R)
        dy = chunks[head].of_query("dy", r, plan.H)
        return _Met(q, dy, q.met_by(held[head].with_q.value), dot(held[head].with_dy.value, dy, (1, 1)))

    def turn_back(place: int, met: _Met) -> tuple[Features, _OfHead]:
        return met.q, _of_head(held[place // plan.R], met, ins["dn"][0, place, 0], plan.normalize)

    shared: dict[int, tuple[Array, ...]] = {}

    def add(place: int, made: tuple[Features, _OfHead]) -> None:
        (q, part), head = made, place // plan.R
        if q.mapped is None:
            dq = part.q.astype(plan.dtype).T
        else:
            dq, dmap = to_raw(plan, q.mapped, part.q)
            outs["q_map"][0, chunks[head].place * plan.R + place % plan.R] += dmap
        outs["q"][0, :, place * plan.X : (place + 1) * plan.X] = dq.astype(plan.dtype)
        of_head = part[1:]
        shared[head] = tuple(a + b for a, b in zip(shared[head], of_head, strict=True)) if head in shared else of_head

    staggered(plan.M * plan.R, query, meet, turn_back, add)
    closed = []
    for chunk, of_state, of_head in zip(chunks, given, held, strict=True):
        after = states["kv"][chunk.place], states["z"][chunk.place]
        closed.append(_of_state_head(plan, chunk, of_state, of_head, shared[chunk.head], after))
    for chunk, grads in zip(chunks, closed, strict=True):
        states["kv"][chunk.place], states["z"][chunk.place] = grads.kv, grads.z
        outs["g"][0, chunk.head, 0], outs["c"][0, chunk.head, 0] = grads.g, grads.c
        if grads.map is not None:
            outs["k_map"][0, chunk.place] += grads.map
    _write(plan, outs["v"], sums.get("v"), [grads.v for grads in closed], plan.H)
    if plan.act is not None:
        _write(plan, outs["k"], sums.get("k"), [grads.k for grads in closed], plan.X)
    else:
        for head, grads in enumerate(closed):
            outs["k"][0, :, head * plan.F : (head + 1) * plan.F] = grads.k.astype(plan.dtype)

    @pl.when(step == plan.chunks - 1)
    def _() -> None:
        for name, ref in states.items():
            outs[name][0] = ref[pl.ds(turn * plan.M, plan.M)]


def _of_state_head(
    plan: Plan, chunk: Chunk, given: tuple, held: _Held, shared: tuple[Array, ...], after: tuple[Array, Array]
) -> _OfStateHead:
    """Cotangents of one state head.

    ``given`` are its key, ``kv`` and ``z``, ``shared`` the sums over its query heads, ``after`` the cotangents of the
    next chunk's ``kv`` and ``z``.
    """
    key, kv, z = given
    dkv, dz = after
    dk, dv, to_kv, to_z, exponent, since = shared
    decay, v, gates = held.decay, chunk.values(), chunk.gates()

    # The decays to the chunk's last token also filled the state.
    taken = decay.take_column * key.rows.astype(jnp.float32)
    # Gates' cotangents are sums of these over many keys that nearly cancel, so dkv is not rounded.
    filled = dot_finely(v, dkv, (1, 1)) + dz
    dk += decay.take_column * filled
    dv += dot(taken.astype(plan.dtype), dkv.astype(plan.dtype))
    kept = jnp.sum(jnp.sum(kv * dkv, 0, keepdims=True), 1, keepdims=True) + jnp.sum(z * dz, 1, keepdims=True)

    into_state = jnp.sum(taken * filled, 1, keepdims=True)
    last = places(plan.C)[1] == plan.C - 1
    exponent += jnp.where(last, into_state, 0.0)
    since += jnp.where(last[:1], decay.keep * kept, 0.0)
    dmap = None
    if key.mapped is not None:
        dk, dmap = to_raw(plan, key.mapped, dk.T)
    return _OfStateHead(
        k=dk,
        v=dv,
        kv=decay.keep * dkv + to_kv,
        z=decay.keep * dz + to_z,
        g=jnp.where(gates > ABSENT, _of_gates(exponent, since), 0.0),
        c=row(jnp.sum(exponent, 1, keepdims=True)),
        map=dmap,
    )


def _write(plan: Plan, out: Any, total: Any, parts: list[Float[Array, "C width"]], width: int) -> None:
    """Write what state heads add to their key/value heads, once the sum over those of each is complete."""
    if plan.P == 1:
        for head, part in enumerate(parts):
            out[0, :, head * width : (head + 1) * width] = part.astype(plan.dtype)
        return
    part = functools.reduce(jnp.add, parts)
    if plan.turns == 1:
        out[0] = part.astype(plan.dtype)
        return
    turn = pl.program_id(3)
    total[...] = part + jnp.where(turn == 0, 0.0, total[...])

    @pl.when(turn == plan.turns - 1)
    def _() -> None:
        out[0] = total[...].astype(plan.dtype)


def backward(
    plan: Plan, arrays: dict[str, Array], starts: dict[str, Array], cotangents: dict[str, Array]
) -> dict[str, Array]:
    """Cotangents of ``arrays`` but ``m``, each under its name and in its layout; of the maps ``[B, heads, F/2, X]``.

    ``starts`` is the state before each chunk, ``cotangents`` are ``dy``, ``dn``, ``dkv`` and ``dz`` of what ``forward``
    returns.
    """
    blocks, shapes = Blocks(plan, reverse=True), state_shapes(plan)
    tokens = {name: x for name, x in arrays.items() if name not in shapes}
    specs = inputs(plan, blocks)
    of_state = ("kv", "z")
    outputs = {name: plan.shape(*x.shape, dtype=x.dtype) for name, x in tokens.items()}
    if plan.act:
        outputs |= {name: plan.shape(plan.B, *arrays[name].shape) for name in ("q_map", "k_map")}
        specs_of_maps = {"q_map": blocks.map_gradients(plan.G), "k_map": blocks.map_gradients(plan.P)}
    else:
        specs_of_maps = {}
    scratch = {name: (plan.turns * plan.M, *shapes[name]) for name in of_state}
    if plan.P > 1 and plan.turns > 1:
        scratch |= {"v": (plan.C, plan.H)} | ({"k": (plan.C, plan.X)} if plan.act else {})
    return call(
        plan,
        functools.partial(log_gate_backward, plan),
        tokens | starts | cotangents,
        specs
        | {"dy": blocks.of_state_heads(plan.R * plan.H), "dn": blocks.rows(plan.R)}
        | {name: blocks.each_chunk(*shape) for name, shape in shapes.items()}
        | {f"d{name}": blocks.at_start(*shapes[name]) for name in of_state},
        outputs | {name: plan.shape(plan.B, plan.S, *shapes[name]) for name in of_state},
        {name: specs[name] for name in tokens}
        | specs_of_maps
        | {name: blocks.at_end(*shapes[name]) for name in of_state},
        scratch,
    )
