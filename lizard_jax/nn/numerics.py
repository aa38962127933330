"""Where precision is decided: accumulation dtypes and matmul precision."""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import accumulator


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """fp32, or float64 where an input already is: what sums, gates, scores and new parameters are computed in."""
    return accumulator(*(a.dtype for a in arrays))


def precision(x: jax.Array) -> jax.lax.Precision:
    """Full matmul precision for fp32 and float64 activations, the accelerator's fast default under bf16."""
    return jax.lax.Precision.DEFAULT if x.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
