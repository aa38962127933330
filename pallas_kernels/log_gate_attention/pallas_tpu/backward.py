"""The backward kernel: from the last chunk to the first, carrying the cotangent of the state."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.log_gate_attention.pallas_tpu.chunk import Chunk, inputs, inverse, state_shapes
from pallas_kernels.log_gate_attention.pallas_tpu.decay import Decay, column, decays, places, row
from pallas_kernels.log_gate_attention.pallas_tpu.features import dot, dot_finely, to_raw
from pallas_kernels.log_gate_attention.pallas_tpu.layout import Blocks, Plan, call
from pallas_kernels.log_gate_attention.state import ABSENT

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class _OfHead(NamedTuple):
    """What one query head adds to each cotangent; fp32."""

    q: Float[Array, "C F"]
    k: Float[Array, "C F"]
    v: Float[Array, "C H"]
    kv: Float[Array, "F H"]
    z: Float[Array, "1 F"]
    exponent: Float[Array, "C C"]  # of each pair
    since: Float[Array, "C 1"]  # of the carried state's decay to each row


def _of_head(
    decay: Decay,
    q: Float[Array, "C F"],
    k: Float[Array, "C F"],
    v: Float[Array, "C H"],
    kv: Float[Array, "F H"],
    z: Float[Array, "1 F"],
    dy: Float[Array, "C H"],
    dn: Float[Array, "C 1"],
    normalize: bool,
) -> _OfHead:
    """Cotangents of one query head's ``y`` and ``n``.

    A pair's weight has the cotangent ``a_i (dy_i·v_j) + b_i``: with ``normalize`` ``a = 1/den`` and
    ``b = (dn - y·dy) / den``, without it ``a = e^level`` and ``b = dn / den``. Where a state holds little but one token
    the two nearly cancel, so ``kv`` is not rounded here; nor is what goes to the cotangent of ``kv``, which cancels
    with that of ``z`` in the gates' cotangents of earlier chunks.
    """
    dtype, wide = q.dtype, q.astype(jnp.float32)
    scores = dot(q, k, (1, 1)) * decay.pair
    on_values, on_state = dot(dy, v, (1, 1)), dot_finely(dy, kv, (1, 1))
    reads_z = decay.carried * jnp.sum(wide * z, 1, keepdims=True)
    reads_kv = decay.carried * jnp.sum(wide * on_state, 1, keepdims=True)
    den = jnp.sum(scores, 1, keepdims=True) + reads_z
    over = inverse(den)
    if normalize:
        y_dy = (jnp.sum(scores * on_values, 1, keepdims=True) + reads_kv) * over
        a, b = over, (dn - y_dy) * over
    else:
        half = jnp.exp(0.5 * decay.level)
        a, b = half * half, dn * over

    weights = a * on_values + b
    dscores = (decay.pair * weights).astype(dtype)
    by_carried = decay.carried * a * dy.astype(jnp.float32)
    return _OfHead(
        q=dot(dscores, k) + decay.carried * (a * on_state + b * z),
        k=dot(dscores, q, (0, 0)),
        v=dot((scores * a).astype(dtype), dy, (0, 0)),
        kv=dot_finely(q, by_carried, (0, 0)),
        z=jnp.sum(wide * (decay.carried * b), 0, keepdims=True),
        exponent=scores * weights,
        since=a * reads_kv + b * reads_z,
    )


def _of_gates(exponent: Float[Array, "C C"], since: Float[Array, "C 1"]) -> Float[Array, "1 C"]:
    """``dg_t = Σ_{i ≥ t} (Σ_{j < t} exponent_ij + since_i)``, summed as it stands.

    The difference of row sums and column sums is the same number, lost to rounding where gates forget hard.
    """
    i, j = places(since.shape[0])
    across = dot(exponent, jnp.where(i < j, 1.0, 0.0))
    return jnp.sum(jnp.where(j <= i, across + since, 0.0), 0, keepdims=True)


def _add(ref, index: tuple, value: Array, first: Array) -> None:
    """Add to what ``ref`` holds, or begin with ``value``."""

    @pl.when(first)
    def _() -> None:
        ref[index] = value

    @pl.when(jnp.logical_not(first))
    def _() -> None:
        ref[index] += value


def log_gate_backward(plan: Plan, ins: dict, outs: dict, sums: dict) -> None:
    """Cotangents of a chunk's inputs; at the first chunk those of the initial state."""
    step, p = pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _() -> None:
        for name in ("kv", "z"):
            sums[name][p] = ins[f"d{name}"][0, 0]

    chunk = Chunk(plan, ins, plan.chunks - 1 - step)
    key, v = chunk.key(), chunk.rows("v")
    k = key.value
    kv, z = ins["kv"][0, 0, 0], ins["z"][0, 0, 0]
    decay = decays(chunk.gates(), chunk.key_scales(key), ins["m"][0, 0, 0])

    shared = None
    for head in range(plan.R):
        q = chunk.query(head)
        dy, dn = chunk.rows("dy", head, plan.H), column(ins["dn"][0, head, 0])
        part = _of_head(decay, q.value, k, v, kv, z, dy, dn, plan.normalize)
        dq = part.q
        if q.mapped is not None:
            dq, dmap = to_raw(plan, q.mapped, part.q)
            _add(outs["q_map"], (0, p * plan.R + head), dmap, step == 0)
        outs["q"][0, :, head * plan.X : (head + 1) * plan.X] = dq.astype(plan.dtype)
        shared = part[1:] if shared is None else tuple(a + b for a, b in zip(shared, part[1:], strict=True))
    assert shared is not None
    dk, dv, to_kv, to_z, exponent, since = shared

    # The chunk's last row of decays also filled the state.
    dkv, dz = sums["kv"][p], sums["z"][p]
    taken = decay.take * k.astype(jnp.float32)
    # Gates' cotangents are sums of these over many keys that nearly cancel, so dkv is not rounded.
    filled = dot_finely(v, dkv, (1, 1)) + dz
    dk += decay.take * filled
    dv += dot(taken.astype(plan.dtype), dkv.astype(plan.dtype))
    kept = jnp.sum(jnp.sum(kv * dkv, 0, keepdims=True), 1, keepdims=True) + jnp.sum(z * dz, 1, keepdims=True)
    sums["kv"][p], sums["z"][p] = decay.keep * dkv + to_kv, decay.keep * dz + to_z

    into_state = row(jnp.sum(taken * filled, 1, keepdims=True))
    last = places(plan.C)[0] == plan.C - 1
    exponent += jnp.where(last, into_state, 0.0)
    since += jnp.where(last[:, :1], decay.keep * kept, 0.0)
    gates = chunk.gates()
    outs["g"][0, 0, 0] = jnp.where(gates > ABSENT, _of_gates(exponent, since), 0.0)
    outs["c"][0, 0, 0] = jnp.sum(exponent, 0, keepdims=True)

    if key.mapped is not None:
        dk, dmap = to_raw(plan, key.mapped, dk)
        _add(outs["k_map"], (0, p), dmap, step == 0)
        _write_sum(plan, outs["k"], sums.get("k"), dk)
    else:
        outs["k"][0] = dk.astype(plan.dtype)
    _write_sum(plan, outs["v"], sums.get("v"), dv)

    @pl.when(step == plan.chunks - 1)
    def _() -> None:
        for name in ("kv", "z"):
            outs[name][0, 0] = sums[name][p]


def _write_sum(plan: Plan, out, total, part: Array) -> None:
    """Write the sum over the state heads of a key/value head, once it is complete."""
    if plan.P == 1:
        out[0] = part.astype(plan.dtype)
        return
    p = pl.program_id(3)
    _add(total, (), part, p == 0)

    @pl.when(p == plan.P - 1)
    def _() -> None:
        out[0] = total[...].astype(plan.dtype)


def backward(
    plan: Plan, arrays: dict[str, Array], starts: dict[str, Array], cotangents: dict[str, Array]
) -> dict[str, Array]:
    """Cotangents of ``arrays`` but ``m``, each under its name and in its layout; of the maps ``[B, heads, X, F]``.

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
    scratch = {name: (plan.P, *shapes[name]) for name in of_state}
    if plan.P > 1:
        scratch |= {"v": (plan.C, plan.H)} | ({"k": (plan.C, plan.X)} if plan.act else {})
    return call(
        plan,
        functools.partial(log_gate_backward, plan),
        tokens | starts | cotangents,
        specs
        | {"dy": blocks.of_state_head(plan.R * plan.H), "dn": blocks.row(plan.R)}
        | {name: blocks.each_chunk(*shape) for name, shape in shapes.items()}
        | {f"d{name}": blocks.at_start(*shapes[name]) for name in of_state},
        outputs | {name: plan.shape(plan.B, plan.S, *shapes[name]) for name in of_state},
        {name: specs[name] for name in tokens}
        | specs_of_maps
        | {name: blocks.at_end(*shapes[name]) for name in of_state},
        scratch,
    )
