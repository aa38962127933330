"""The learned feature map φ of the gated linear branch (Lizard §3.1, Hedgehog's form)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lizard_jax.nn.params import NewParam
from lizard_jax.typing import Array, Float, Key
from pallas_kernels.log_gate_attention import feature_map

SLOW = 0.25
"""Radians within a window up to which a RoPE pair counts as slow."""


def identity_start(head_dim: int, half: int) -> Float[Array, "H f"]:
    """A that copies coordinates of x; with ``half < H`` it keeps whole RoPE pairs, the slowest-turning ones."""
    if half >= head_dim:
        return jnp.eye(head_dim, half, dtype=jnp.float32)
    pairs = half // 2
    middle = head_dim // 2
    kept = jnp.concatenate([jnp.arange(middle - pairs, middle), jnp.arange(head_dim - (half - pairs), head_dim)])
    return jnp.eye(head_dim, dtype=jnp.float32)[:, kept]


def slow_start(
    frequencies: Float[Array, " H/2"], window: int, heads: int, half: int, key: Key[Array, ""]
) -> Float[Array, "heads H half"]:
    """A for each of ``heads`` heads: normal(0, 1/H) on the coordinates of slow RoPE pairs, 0 on the others.

    Queries and keys reach the linear branch unrotated, and at distances beyond the window only pairs that turn less
    than ``SLOW`` radians within one are still near their teacher's angle. At least the slowest pair is kept.
    """
    head_dim = 2 * frequencies.shape[0]
    slow = (frequencies * window <= SLOW) | (frequencies == jnp.min(frequencies))
    kept = jnp.concatenate([slow, slow])[:, None].astype(jnp.float32)
    return kept * jax.random.normal(key, (heads, head_dim, half), jnp.float32) / head_dim**0.5


class FeatureMap(nnx.Module):
    """φ(x) = act(xA) ⊕ act(−xA), a matrix A[H, F/2] for each of ``heads`` heads, no bias.

    ``act="softmax"`` is taken over the features of each half. ``act="exp"`` returns φ(x)·e^{−m} and m, so that no raw
    score is ever exponentiated; a caller adds m back where it takes logarithms.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        half: int,
        act: Literal["softmax", "exp"],
        start: Literal["identity", "random"] | Float[Array, "heads H half"],
        *,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.act: Literal["softmax", "exp"] = act
        if not isinstance(start, str):
            kernel = start
        elif start == "identity":
            kernel = jnp.broadcast_to(identity_start(head_dim, half), (heads, head_dim, half))
        else:
            kernel = jax.random.normal(rngs.params(), (heads, head_dim, half), jnp.float32) / head_dim**0.5
        self.kernel = NewParam(kernel)

    def __call__(self, x: Float[Array, "B T K H"]) -> tuple[Float[Array, "B T S F"], Float[Array, "B T S"]]:
        """Features of every head, and their log-scale m (zero for ``softmax``).

        ``x`` may have fewer heads than the map: then each of its heads feeds ``heads / K`` maps. Features come in
        x's dtype, m in fp32.
        """
        return feature_map(x, self.kernel[...], self.act)
