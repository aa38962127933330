"""Which key heads of a teacher are worth exact memory: ``python -m lizard_jax.select TEACHER``."""
