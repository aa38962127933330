"""Linearize pretrained Llama and Mistral checkpoints in JAX."""

from lizard_jax.load import load

__all__ = ["load"]
