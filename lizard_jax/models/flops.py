"""What a decoder computes: the unit in which a step's work is told."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from lizard_jax.config import ModelConfig
from lizard_jax.models.llama import Llama


def forward_flops(config: ModelConfig, tokens: int) -> int:
    """FLOPs of the teacher's forward pass without its attention's scores: two for each weight that a token meets."""
    teacher = dataclasses.replace(config, attention=None)
    state = nnx.state(nnx.eval_shape(lambda: Llama(teacher, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    weights = sum(leaf.size for path, leaf in nnx.to_flat_state(state) if leaf.ndim == 2 and "embed" not in path)
    head = config.vocab_size * config.hidden_size if config.tie_embeddings else 0
    return 2 * tokens * (weights + head)
