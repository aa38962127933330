"""One token of gated linear attention: the recurrence itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.log_gate_attention.readout import read, weight
from pallas_kernels.log_gate_attention.state import LinearState
from pallas_kernels.numerics import ABSENT, EMPTY

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def step(
    q: Float[Array, "B N F"],
    k: Float[Array, "B S F"],
    v: Float[Array, "B K H"],
    g: Float[Array, "B S"] | Float[Array, "B S F"],
    c: Float[Array, "B S"],
    state: LinearState,
    normalize: bool,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N"], LinearState]:
    """``kv ← e^g kv + e^c k vᵀ``, ``z ← e^g z + e^c k``, then ``y = qᵀkv / qᵀz`` and ``n = log qᵀz``.

    All arguments are of one dtype, the accumulators' (fp32 or fp64), and so are the results.
    """
    (B, N, _), (S, F), (K, H) = q.shape, k.shape[1:], v.shape[1:]
    per_feature = g.ndim == 3
    gate, before = (g, state.m) if per_feature else (g[..., None], state.m[..., None])
    scale = c[..., None]

    # The new scale: what the old one decays to, or the new key's, whichever is larger.
    m = jnp.maximum(before + gate, scale)
    m = jax.lax.stop_gradient(jnp.where(m > ABSENT, m, EMPTY))

    keep = weight(before + gate > ABSENT, gate + (before - m))
    take = weight(scale > ABSENT, scale - m)
    key = take * k
    outer = jnp.einsum("bkpf,bkh->bkpfh", key.reshape(B, K, S // K, F), v, precision="highest").reshape(B, S, F, H)
    kv, z = keep[..., None] * state.kv + outer, keep * state.z + key

    # Read relative to the largest scale in the head.
    row = jnp.max(m, -1)
    heads = q.reshape(B, S, N // S, F) * weight(m > ABSENT, m - row[..., None])[..., None, :]
    num = jnp.einsum("bsrf,bsfh->bsrh", heads, kv, precision="highest").reshape(B, N, H)
    den = jnp.einsum("bsrf,bsf->bsr", heads, z, precision="highest").reshape(B, N)
    y, n = read(num, den, jnp.repeat(row, N // S, axis=-1), normalize)
    return y, n, LinearState(kv, z, m if per_feature else m[..., 0])
