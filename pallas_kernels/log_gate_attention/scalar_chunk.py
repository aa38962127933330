"""One chunk under gates of one value per state head: a score matrix times a matrix of pairwise decays.

Axis letters as in ``grouped``. Per chunk and query head this costs ``C²(F + H) + C·F·H`` multiplications, and per state
head ``C²`` exponentials.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from pallas_kernels.log_gate_attention.exponents import exponents
from pallas_kernels.log_gate_attention.grouped import Tokens
from pallas_kernels.log_gate_attention.readout import holds, read, unscale
from pallas_kernels.log_gate_attention.state import LinearState
from pallas_kernels.numerics import ABSENT, EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Decay:
    """What the gates and key scales of a chunk come to, all relative to each row's scale ``m``."""

    pair: Float[Array, "B K P C C"]  # e^(g_{j+1} + … + g_i + c_j - m_i), 0 above the diagonal and for absent keys
    carried: Float[Array, "B K P C"]  # e^(m of the carried state + g_0 + … + g_i - m_i)
    m: Float[Array, "B K P C"]  # about the largest log weight in the row's memory
    take: Float[Array, "B K P C"]  # what the next state takes of each key, relative to its own scale
    keep: Float[Array, "B K P"]  # and what it keeps of the carried one
    m_next: Float[Array, "B K P"]  # the next state's scale


def decay(g: Float[Array, "B C K P"], c: Float[Array, "B C K P"], m: Float[Array, "B K P"]) -> Decay:
    """Pairwise decays of a chunk that starts from a state of scale ``m``; see ``exponents`` for how."""
    sums = exponents(jnp.moveaxis(g, 1, -1), jnp.moveaxis(c, 1, -1))
    place = jnp.arange(g.shape[1])
    there = (place[:, None] >= place) & (sums.borders[..., :, None] == sums.borders[..., None, :])
    there &= sums.hi[..., None, :] > ABSENT
    old = (sums.borders == 0) & (m > ABSENT)[..., None]

    # Of the scales M and m, any value near the largest will do; what matters is that both sides use the same one.
    M = jnp.maximum(jnp.max(jnp.where(there, sums.hi[..., None, :], EMPTY), -1), jnp.where(old, m[..., None], EMPTY))
    pair = jnp.exp(jnp.where(there, (sums.hi[..., None, :] - M[..., None]) + sums.lo[..., None, :], -jnp.inf))
    carried = jnp.exp(jnp.where(old, m[..., None] - M, -jnp.inf))
    nonempty = M > ABSENT
    row = jnp.where(nonempty, (M + sums.coarse) + sums.rest, EMPTY)

    # The next scale is rounded; what rounding took from it goes into the weights.
    last, past = M[..., -1], sums.coarse[..., -1]
    total = last + past
    lost = (last - (total - (total - last))) + (past - (total - last))
    factor = jnp.exp(jnp.where(nonempty[..., -1], lost + sums.rest[..., -1], 0.0))
    m_next = jnp.where(nonempty[..., -1], total, EMPTY)
    return Decay(pair, carried, row, pair[..., -1, :] * factor[..., None], carried[..., -1] * factor, m_next)


def _advance(state: LinearState, k, v, decays: Decay, precision) -> LinearState:
    """The state after the chunk."""
    key = k * jnp.moveaxis(decays.take, -1, 1)[..., None]
    return LinearState(
        decays.keep[..., None, None] * state.kv + jnp.einsum("bjkpf,bjkh->bkpfh", key, v, precision=precision),
        decays.keep[..., None] * state.z + jnp.sum(key, 1),
        decays.m_next,
    )


def forward(
    tokens: Tokens,
    state: LinearState,
    normalize: bool,
    precision,
) -> tuple[Float[Array, "B C K P R H"], Float[Array, "B C K P R"], LinearState]:
    """Output, log normalizer and next state of one chunk."""
    q, k, v, g, c = tokens
    decays = decay(g, c, state.m)
    scores = jnp.einsum("bikprf,bjkpf->bkpirj", q, k, precision=precision) * decays.pair[..., :, None, :]
    carried = decays.carried[..., None]
    num = jnp.einsum("bkpirj,bjkh->bkpirh", scores, v, precision=precision)
    num += carried[..., None] * jnp.einsum("bikprf,bkpfh->bkpirh", q, state.kv, precision=precision)
    den = jnp.sum(scores, -1) + carried * jnp.einsum("bikprf,bkpf->bkpir", q, state.z, precision=precision)
    y, n = read(num, den, jnp.broadcast_to(decays.m[..., None], den.shape), normalize)
    return jnp.moveaxis(y, 3, 1), jnp.moveaxis(n, 3, 1), _advance(state, k, v, decays, precision)


def backward(
    tokens: Tokens,
    state: LinearState,
    dy: Float[Array, "B C K P R H"],
    dn: Float[Array, "B C K P R"],
    dkv: Float[Array, "B K P F H"],
    dz: Float[Array, "B K P F"],
    normalize: bool,
    precision,
):
    """Cotangents of ``(q, k, v, g, c, kv, z)``, given those of ``forward``'s results. Scales ``m`` are constants.

    A pair's weight has the cotangent ``a_i (dy_i·v_j) + b_i``: with ``normalize`` ``a = 1/den`` and
    ``b = (dn - y·dy) / den``, without it ``a = e^m`` and ``b = dn / den``.
    """
    q, k, v, g, c = tokens
    decays = decay(g, c, state.m)
    dy, dn = jnp.moveaxis(dy, 1, 3), jnp.moveaxis(dn, 1, 3)
    carried = decays.carried[..., None]
    scores = jnp.einsum("bikprf,bjkpf->bkpirj", q, k, precision=precision) * decays.pair[..., :, None, :]
    reads_z = carried * jnp.einsum("bikprf,bkpf->bkpir", q, state.z, precision=precision)

    # dy against each value, and against the carried state.
    on_values = jnp.einsum("bkpirh,bjkh->bkpirj", dy, v, precision=precision)
    on_state = jnp.einsum("bkpirh,bkpfh->bkpirf", dy, state.kv, precision=precision)
    den = jnp.sum(scores, -1) + reads_z
    nonempty = holds(den)
    inverse = jnp.where(nonempty, 1.0 / jnp.where(nonempty, den, 1.0), 0.0)
    if normalize:
        reads_kv = carried * jnp.einsum("bikprf,bkpirf->bkpir", q, on_state, precision=precision)
        y_dy = (jnp.sum(scores * on_values, -1) + reads_kv) * inverse
        a, b = inverse, (dn - y_dy) * inverse
    else:
        a = unscale(jnp.ones_like(den)[..., None], decays.m[..., None])[..., 0]
        b = dn * inverse

    weights = a[..., None] * on_values + b[..., None]
    dscores = decays.pair[..., :, None, :] * weights
    on_state = carried[..., None] * (a[..., None] * on_state + b[..., None] * state.z[..., None, None, :])
    a_dy, b_rows = (carried * a)[..., None] * dy, carried * b

    take, keep = jnp.moveaxis(decays.take, -1, 1)[..., None], decays.keep
    filled = jnp.einsum("bjkh,bkpfh->bjkpf", v, dkv, precision=precision) + dz[:, None]
    dq = jnp.einsum("bkpirj,bjkpf->bikprf", dscores, k, precision=precision) + jnp.moveaxis(on_state, 3, 1)
    dk = jnp.einsum("bkpirj,bikprf->bjkpf", dscores, q, precision=precision) + take * filled
    dv = jnp.einsum("bkpirj,bkpirh->bjkh", scores, a[..., None] * dy, precision=precision)
    dv += jnp.einsum("bjkpf,bkpfh->bjkh", take * k, dkv, precision=precision)
    dkv_before = keep[..., None, None] * dkv + jnp.einsum("bikprf,bkpirh->bkpfh", q, a_dy, precision=precision)
    dz_before = keep[..., None] * dz + jnp.einsum("bikprf,bkpir->bkpf", q, b_rows, precision=precision)

    # Cotangents of the exponents: of each pair, and of the carried state's decay to each row.
    last = jnp.arange(g.shape[1]) == g.shape[1] - 1
    exponent = jnp.sum(scores * weights, -2)
    into_state = jnp.moveaxis(jnp.sum(take * k * filled, -1), 1, -1)
    exponent += jnp.where(last[:, None], into_state[..., None, :], 0.0)
    kept = keep * (jnp.sum(state.kv * dkv, (-2, -1)) + jnp.sum(state.z * dz, -1))
    since = jnp.sum(jnp.einsum("bikprf,bkpirf->bkpir", q, on_state, precision=precision), -1)
    since += jnp.where(last, kept[..., None], 0.0)
    dg, dc = _gate_cotangent(exponent, since), jnp.sum(exponent, -2)
    return dq, dk, dv, jnp.moveaxis(dg, -1, 1), jnp.moveaxis(dc, -1, 1), dkv_before, dz_before


def _after(C: int, dtype) -> Float[Array, "C C"]:
    """1 where the row's place comes after the column's."""
    return jnp.tril(jnp.ones((C, C), dtype), -1)


def _gate_cotangent(exponent: Float[Array, "B K P C C"], since: Float[Array, "B K P C"]) -> Float[Array, "B K P C"]:
    """Each gate's cotangent: the sum over the pairs it lies between, and over the rows that it parts from the state.

    ``dg_t = Σ_{i ≥ t} (Σ_{j < t} exponent_ij + since_i)``, summed as it stands. The difference of row sums and column
    sums gives the same number and loses it to rounding where gates forget hard.
    """
    C = since.shape[-1]
    place = jnp.arange(C)
    across = jnp.einsum("bkpij,tj->bkpit", exponent, _after(C, since.dtype), precision="highest")
    parted = jnp.where(place[:, None] >= place, across + since[..., :, None], 0.0)
    return jnp.sum(parted, -2)
