"""Which parameter of a model is damaged."""

import jax
import jax.numpy as jnp
from flax import nnx

from lizard_jax.sharding import path_name


def not_finite(tree: nnx.Module | nnx.State) -> str | None:
    """The path of the first parameter that holds NaN or infinity, as ``layers/0/mlp/up_proj/kernel``."""
    state = tree if isinstance(tree, nnx.State) else nnx.state(tree, nnx.Param)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            return path_name(path)
    return None
