"""One chunk under gates of one value per feature: the decay stands inside each dot product.

No matmul computes ``Σ_f q_if k_jf e^(L_ijf)`` without dividing by a cumulative gate, which overflows. So a chunk is cut
into pieces of 16 tokens; inside a piece every pair and feature is computed on its own, and the state is carried from
piece to piece. Time and working memory per head are ``16·T·F`` exponentials and ``16²·F`` numbers, several times the
cost of gates of one value per head.

Axis letters as in ``grouped``. Every feature of the state has a scale ``m`` of its own, for one may be forgotten while
another is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.exponents import Exponents, exponents, split
from pallas_kernels.log_gate_attention.grouped import Tokens
from pallas_kernels.log_gate_attention.readout import read, weight
from pallas_kernels.log_gate_attention.state import LinearState
from pallas_kernels.numerics import ABSENT, EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float

PIECE = 16


@jax.custom_vjp
def _pairs(g, c, scale):
    """``g_{j+1,f} + … + g_{i,f} + c_j - scale_if``, ``[B, C, C, K, P, F]``, by differences that do not round.

    Their gradient is a masked sum over pairs: each gate takes part in those it lies between.
    """
    sums = _exponents(g, c)
    coarse = (sums.hi[:, None] + sums.coarse[:, :, None]) - scale[:, :, None]
    return coarse + (sums.lo[:, None] + sums.rest[:, :, None])


def _pairs_fwd(g, c, scale):
    return _pairs(g, c, scale), scale


def _pairs_bwd(scale, cotangent):
    C = cotangent.shape[1]
    place = jnp.arange(C)
    before = (place[:, None] > place).astype(cotangent.dtype)
    across = jnp.einsum("bijkpf,tj->bitkpf", cotangent, before, precision="highest")
    inside = (place[:, None] >= place)[..., None, None, None]
    return jnp.sum(jnp.where(inside, across, 0.0), 1), jnp.sum(cotangent, (1, -1)), jnp.zeros_like(scale)


_pairs.defvjp(_pairs_fwd, _pairs_bwd)


def _exponents(g: Float[Array, "B C K P F"], c: Float[Array, "B C K P"]) -> Exponents:
    sums = exponents(jnp.moveaxis(g, 1, -1), jnp.moveaxis(c, 1, -1)[..., None, :])
    return Exponents(*(jnp.moveaxis(x, -1, 1) for x in sums))


def _piece(tokens: Tokens, state: LinearState, normalize: bool, precision):
    q, k, v, g, c = tokens
    C = g.shape[1]
    place = jnp.arange(C)
    sums = jax.lax.stop_gradient(_exponents(g, c))
    there = (place[:, None] >= place)[..., None, None, None] & (sums.borders[:, :, None] == sums.borders[:, None])
    there &= sums.hi[:, None] > ABSENT
    old = (sums.borders == 0) & (state.m > ABSENT)[:, None]

    own, own_rest = split(state.m)
    highest = jnp.max(jnp.where(there, sums.hi[:, None] + sums.coarse[:, :, None], EMPTY), 2)
    highest = jnp.maximum(highest, jnp.where(old, own[:, None] + sums.coarse, EMPTY))
    m = jnp.max(highest, -1)

    row = jnp.broadcast_to(m[..., None], highest.shape)
    pair = weight(there, _pairs(g, c, row))
    rest = _since(g) + own_rest[:, None]
    carried = weight(old, ((own[:, None] + sums.coarse) - row) + rest)

    scores = jnp.einsum("bikprf,bijkpf->bikprj", q, pair * k[:, None], precision=precision)
    decayed = q * carried[..., None, :]
    num = jnp.einsum("bikprj,bjkh->bikprh", scores, v, precision=precision)
    num += jnp.einsum("bikprf,bkpfh->bikprh", decayed, state.kv, precision=precision)
    den = jnp.sum(scores, -1) + jnp.einsum("bikprf,bkpf->bikpr", decayed, state.z, precision=precision)
    y, n = read(num, den, jnp.broadcast_to(m[..., None], den.shape), normalize)

    # The state is left at each feature's own scale.
    last = highest[:, -1]
    keys = weight(there[:, -1], _pairs(g, c, highest)[:, -1]) * k
    keep = weight(old[:, -1], ((own + sums.coarse[:, -1]) - last) + rest[:, -1])
    kv = keep[..., None] * state.kv + jnp.einsum("bjkpf,bjkh->bkpfh", keys, v, precision=precision)
    return y, n, LinearState(kv, keep * state.z + jnp.sum(keys, 1), last)


def _since(g: Float[Array, "B C K P F"]) -> Float[Array, "B C K P F"]:
    """Running sums of the gates' rests, which carry the gates' whole gradient."""
    return jnp.cumsum(split(jnp.where(g <= ABSENT, 0.0, g))[1], 1)


def forward(
    tokens: Tokens,
    state: LinearState,
    normalize: bool,
    precision,
) -> tuple[Float[Array, "B C K P R H"], Float[Array, "B C K P R"], LinearState]:
    """Output, log normalizer and next state of one chunk."""
    outputs = []
    for start in range(0, tokens.g.shape[1], PIECE):
        piece = Tokens(*(x[:, start : start + PIECE] for x in tokens))
        y, n, state = _piece(piece, state, normalize, precision)
        outputs.append((y, n))
    y, n = (jnp.concatenate(parts, 1) for parts in zip(*outputs, strict=True))
    return y, n, state


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
    """Cotangents of ``(q, k, v, g, c, kv, z)`` by autodiff of ``forward``.

    The gradients of the exponents are masked sums there, as ``_pairs`` says.
    """

    def run(tokens, kv, z):
        y, n, new = forward(tokens, LinearState(kv, z, state.m), normalize, precision)
        return y, n, new.kv, new.z

    dtokens, dkv, dz = jax.vjp(run, tokens, state.kv, state.z)[1]((dy, dn, dkv, dz))
    return *dtokens, dkv, dz
