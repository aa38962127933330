"""Where precision is decided: accumulation dtypes and matmul precision."""

import jax
import jax.numpy as jnp

ABSENT = -1e30
"""Log-weight of something that is not there: finite, so that differences of two of them stay numbers."""


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """fp32, or float64 where an input already is: what sums, gates, scores and new parameters are computed in."""
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)


def precision(x: jax.Array) -> jax.lax.Precision:
    """Full matmul precision for fp32 and float64 activations, the accelerator's fast default under bf16."""
    return jax.lax.Precision.DEFAULT if x.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
