"""Linearize pretrained Llama and Mistral checkpoints in JAX."""

from lizard_jax.accelerators import settle_platform
from lizard_jax.load import load

settle_platform()

__all__ = ["load"]
