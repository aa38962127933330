"""From logits to the next token."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lizard_jax.config import option
from lizard_jax.errors import UserError
from lizard_jax.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Filters apply in the order of the fields, after the temperature.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = option(0.0, "Logits are divided by it; 0 always takes the likeliest token (greedy).")
    top_k: int = option(0, "Keep the k likeliest tokens; 0 keeps all.")
    top_p: float = option(1.0, "Keep the likeliest tokens that together reach this probability.")
    min_p: float = option(0.0, "Drop tokens below this fraction of the likeliest one's probability.")
    repetition_penalty: float = option(
        1.0, "Divide positive logits of tokens seen before, prompt included, by it, and multiply negative ones."
    )
    seed: int = option(0, "Of the draws; a prompt draws the same alone and in a batch.")

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature < math.inf, "0 (greedy) or 1e-6 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "between 0.001 and 1000"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2^32"),
        ):
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}, must be {allowed}")

    @property
    def remembers(self) -> bool:
        """Whether tokens seen before matter."""
        return self.repetition_penalty != 1.0


def filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits over the temperature, -inf where a filter drops the token; the likeliest token always stays."""
    # Below the largest: what small temperatures blow up is then 0 or less, and never overflows to infinity.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        order = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(order, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        smallest = jnp.min(jnp.where(before < sampling.top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.min_p > 0.0:
        # Of the likeliest token, which is log 1 = 0 below itself.
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p)).astype(logits.dtype)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def draw(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"] | None,
    rows: Int[Array, " B"],
    positions: Int[Array, " B"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """One token a row.

    Args:
        seen: tokens that were in the row before; needed where ``sampling.remembers``.
        rows, positions: what a draw depends on beside the seed: the number of its prompt and of its token.
    """
    if sampling.remembers:
        assert seen is not None
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    start = jax.random.key(sampling.seed)
    keys = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(start, row), at))(rows, positions)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling)).astype(jnp.int32)
