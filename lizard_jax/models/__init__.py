"""Decoders by the architecture their configuration names."""

from flax import nnx
from jax.typing import DTypeLike

from lizard_jax.config import ModelConfig
from lizard_jax.models.llama import Llama
from lizard_jax.models.mistral import Mistral

__all__ = ["Llama", "Mistral", "build"]


def build(config: ModelConfig, *, dtype: DTypeLike = "float32", rngs: nnx.Rngs) -> Llama:
    """A freshly initialised decoder; Qwen2 and Qwen3 are Llama with biases or q/k norms switched on."""
    family = Mistral if config.architecture == "mistral" else Llama
    return family(config, dtype=dtype, rngs=rngs)
