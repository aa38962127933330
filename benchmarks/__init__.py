"""Measurements, each file a command of its own."""

import lizard_jax  # noqa: F401  tells JAX, before it is imported, where no accelerator is
