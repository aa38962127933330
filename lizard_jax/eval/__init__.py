"""Measurements of a checkpoint, each one command: ``python -m lizard_jax.eval NAME CKPT``."""
