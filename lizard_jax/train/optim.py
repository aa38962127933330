"""AdamW as the paper trains: linear warmup, cosine decay, a clipped global norm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lizard_jax.config import OptimConfig
from lizard_jax.nn.params import NewParam
from lizard_jax.sharding import path_name


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of step ``i`` of ``steps``: linear from 0 over the warmup, then a cosine down to the final share.

    With ``w = round(warmup · steps)`` (at least one where a warmup is asked for) the rate is
    ``peak · (i + 1) / w`` for ``i < w``, so the first step already moves, then
    ``peak · (final + (1 − final) · (1 + cos(π · (i − w) / (steps − w))) / 2)``.
    """
    warm = max(1, round(config.warmup * steps)) if config.warmup > 0 else 0
    peak, final = config.learning_rate, config.final

    def rate(step: Any) -> jax.Array:
        i = jnp.asarray(step, jnp.float32)
        rising = (i + 1.0) / max(warm, 1)
        share = jnp.clip((i - warm) / max(steps - warm, 1), 0.0, 1.0)
        falling = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
        return peak * jnp.where(i < warm, rising, falling)

    return rate


def decays(state: nnx.State) -> Any:
    """Which parameters weight decay touches: matrices, but never those of Lizard attention (``NewParam``)."""

    def touched(leaf: Any) -> bool:
        return not isinstance(leaf, NewParam) and leaf.ndim > 1

    return jax.tree.map(touched, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


class OptimizerState(NamedTuple):
    """What the optimizer carries between steps.

    ``master`` holds, by path, an fp32 copy of each trained parameter of a narrower dtype: an update below half a
    bf16 step would otherwise be lost every time.
    """

    step: jax.Array
    moments: Any
    master: dict[str, jax.Array]


class Optimizer:
    """AdamW by ``OptimConfig``: clip by global norm, fp32 (or fp64) moments, decay, the scheduled rate."""

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self.schedule = schedule(config, steps)
        self._direction = optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
            optax.add_decayed_weights(config.weight_decay, mask=decays),
        )

    def init(self, params: nnx.State) -> OptimizerState:
        """Zero moments, and master copies of the narrow parameters."""
        master = {name: leaf.astype(_wide(leaf)) for name, leaf in _named(params) if leaf.dtype != _wide(leaf)}
        return OptimizerState(jnp.zeros((), jnp.int32), self._direction.init(widen(params)), master)

    def update(
        self, grads: nnx.State, state: OptimizerState, params: nnx.State
    ) -> tuple[nnx.State, OptimizerState, dict[str, jax.Array]]:
        """One step: the new parameters in their own dtype, the new state, and ``grad_norm`` and ``learning_rate``.

        ``p ← p − rate · (adam(clip(g)) + decay · p)``
        """
        grads = widen(grads)
        wide = jax.tree_util.tree_map_with_path(
            lambda path, leaf: state.master[name] if (name := path_name(path)) in state.master else leaf, params
        )
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer step count
            direction, moments = self._direction.update(grads, state.moments, wide)
        rate = jnp.asarray(self.schedule(state.step))
        wide = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, wide, direction)
        master = {name: leaf for name, leaf in _named(wide) if name in state.master}
        params = jax.tree.map(lambda old, new: new.astype(old.dtype), params, wide)
        info = {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return params, OptimizerState(state.step + 1, moments, master), info


def widen(tree: Any) -> Any:
    """Leaves in at least fp32: what moments, clipping and updates are computed in."""
    return jax.tree.map(lambda leaf: leaf.astype(_wide(leaf)), tree)


def _wide(leaf: jax.Array) -> Any:
    return leaf.dtype if leaf.dtype == jnp.float64 else jnp.float32


def _named(tree: Any) -> list[tuple[str, jax.Array]]:
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]
