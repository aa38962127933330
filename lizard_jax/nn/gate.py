"""The forget gate γ of the linear branch, as log γ ≤ 0 (Lizard §3.2 and the variants it is compared with)."""

import jax
import jax.numpy as jnp
from flax import nnx

from lizard_jax.config import LizardConfig
from lizard_jax.nn.numerics import accumulation_dtype, precision
from lizard_jax.nn.params import NewParam
from lizard_jax.typing import Array, Float

LOW_RANK = 16
BIAS_RANGE = (1.0, 6.0)
"""Spread of the starting logits across heads: half-lives from about 2 to about 280 tokens."""


class Gate(nnx.Module):
    """log γ from the layer's normalized input: one number a state head, or one a feature.

    =============  ==========================================================
    ``scalar``     σ(x·w + b), or σ(x·w) with ``gate_bias`` off (the paper's)
    ``mamba2``     exp(−softplus(x·w)·e^a)
    ``low_rank``   σ(xW₁W₂), rank 16, per feature
    ``channel``    σ(xW), per feature
    ``pooled``     σ(mean over H of k_t), no parameters
    ``none``       1
    =============  ==========================================================
    """

    def __init__(self, config: LizardConfig, width: int, heads: int, features: int, *, rngs: nnx.Rngs):
        self.kind = config.gate
        self.heads = heads
        spread = jnp.linspace(*BIAS_RANGE, heads, dtype=jnp.float32)
        bias = down = kernel = None
        # Weights start at zero, so that every gate starts exactly where its bias puts it.
        if self.kind == "scalar":
            kernel = NewParam(jnp.zeros((width, heads), jnp.float32))
            bias = NewParam(spread) if config.gate_bias else None
        elif self.kind == "mamba2":
            kernel = NewParam(jnp.zeros((width, heads), jnp.float32))
            bias = NewParam(jnp.log(jax.nn.softplus(-spread) / jnp.log(2.0)))
        elif self.kind == "low_rank":
            down = NewParam(jax.random.normal(rngs.params(), (width, LOW_RANK), jnp.float32) / width**0.5)
            kernel = NewParam(jnp.zeros((LOW_RANK, heads, features), jnp.float32))
        elif self.kind == "channel":
            kernel = NewParam(jnp.zeros((width, heads, features), jnp.float32))
        self.kernel, self.down, self.bias = nnx.data(kernel), nnx.data(down), nnx.data(bias)

    def __call__(
        self, x: Float[Array, "B T D"], k: Float[Array, "B T K H"]
    ) -> Float[Array, "B T S"] | Float[Array, "B T S F"]:
        """log γ_t in fp32 for every position of x; k (unrotated) is read by ``pooled`` alone."""
        dtype = accumulation_dtype(x)
        if self.kind == "none":
            return jnp.zeros((*x.shape[:2], self.heads), dtype)
        if self.kind == "pooled":
            pooled = jnp.mean(k.astype(dtype), axis=-1)
            return jax.nn.log_sigmoid(jnp.repeat(pooled, self.heads // k.shape[2], axis=-1))
        wide = x.astype(dtype)
        if self.down is not None:
            wide = jnp.einsum("btd,dr->btr", wide, self.down[...].astype(dtype), precision=precision(x))
        assert self.kernel is not None
        logits = jnp.einsum("btd,d...->bt...", wide, self.kernel[...].astype(dtype), precision=precision(x))
        if self.kind == "mamba2":
            assert self.bias is not None
            return -jax.nn.softplus(logits) * jnp.exp(self.bias[...].astype(dtype))
        if self.bias is not None:
            logits = logits + self.bias[...].astype(dtype)
        return jax.nn.log_sigmoid(logits)
