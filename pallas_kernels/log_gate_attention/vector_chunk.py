"""One chunk under gates of one value per feature: the decay stands inside each dot product.

No matmul computes ``Σ_f q_if k_jf e^(L_ijf)`` without dividing by a cumulative gate, which overflows. So a chunk is cut
into pieces of 16 tokens; inside a piece every pair and feature is computed on its own, and the state is carried from
piece to piece. Time and working memory per head are ``16·T·F`` exponentials and ``16²·F`` numbers, several times the
cost of gates of one value per head.

Axis letters as in ``grouped``. Every feature of the state has a scale ``m`` of its own, for one may be forgotten while
another is kept.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.log_gate_attention.grouped import Tokens
from pallas_kernels.log_gate_attention.readout import read, weight
from pallas_kernels.log_gate_attention.state import ABSENT, EMPTY, LinearState

PIECE = 16


def _piece(tokens: Tokens, state: LinearState, normalize: bool, precision):
    q, k, v, g, c = tokens
    C = g.shape[1]
    place = jnp.arange(C)
    triangle = jnp.tril(jnp.ones((C, C), g.dtype))
    steps = jnp.where((place[:, None] > place)[..., None, None, None], g[:, :, None], 0.0)
    between = jnp.einsum("it,btjkpf->bijkpf", triangle, steps, precision="highest")
    since = jnp.einsum("it,btkpf->bikpf", triangle, g, precision="highest")

    scale = c[..., None]
    there = (place[:, None] >= place)[..., None, None, None] & (between + scale[:, None] > ABSENT)
    old = state.m[:, None] + since
    highest = jnp.maximum(jnp.max(jnp.where(there, between + scale[:, None], EMPTY), 2), old)
    highest = jax.lax.stop_gradient(jnp.where(highest > ABSENT, highest, EMPTY))
    m = jnp.max(highest, -1)

    row = m[..., None]
    pair = weight(there, between + (scale[:, None] - row[:, :, None]))
    carried = weight(old > ABSENT, since + (state.m[:, None] - row))

    scores = jnp.einsum("bikprf,bijkpf->bikprj", q, pair * k[:, None], precision=precision)
    decayed = q * carried[..., None, :]
    num = jnp.einsum("bikprj,bjkh->bikprh", scores, v, precision=precision)
    num += jnp.einsum("bikprf,bkpfh->bikprh", decayed, state.kv, precision=precision)
    den = jnp.sum(scores, -1) + jnp.einsum("bikprf,bkpf->bikpr", decayed, state.z, precision=precision)
    y, n = read(num, den, jnp.broadcast_to(m[..., None], den.shape), normalize)

    # The state is left at each feature's own scale.
    own = highest[:, -1]
    keys = weight(there[:, -1], between[:, -1] + (scale - own[:, None])) * k
    keep = weight(old[:, -1] > ABSENT, since[:, -1] + (state.m - own))
    kv = keep[..., None] * state.kv + jnp.einsum("bjkpf,bjkh->bkpfh", keys, v, precision=precision)
    return y, n, LinearState(kv, keep * state.z + jnp.sum(keys, 1), own)


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

    The exponents are masked sums there, so their transposes are masked sums too.
    """

    def run(tokens, kv, z):
        y, n, new = forward(tokens, LinearState(kv, z, state.m), normalize, precision)
        return y, n, new.kv, new.z

    dtokens, dkv, dz = jax.vjp(run, tokens, state.kv, state.z)[1]((dy, dn, dkv, dz))
    return *dtokens, dkv, dz
