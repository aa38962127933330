"""The two losses: next-token cross-entropy, and the error of a layer's head outputs."""

import jax
import jax.numpy as jnp

from lizard_jax.models.llama import Llama
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.typing import Array, Float, Int

LOGITS_AT_ONCE = 2**25
"""Logits kept in memory at a time; the rest is recomputed, so that a vocabulary of 128k costs no 8 GB."""


def cross_entropy(
    model: Llama, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over unmasked positions of −log p(target), in nats, fp32.

    Logits are formed for a slice of the sequence at a time and formed again in the backward pass.
    """
    batch, time, _ = hidden.shape
    slices = 1
    while slices < time and (batch * time * model.config.vocab_size) // slices > LOGITS_AT_ONCE:
        slices *= 2
    length = -(-time // slices)
    pad = slices * length - time

    def cut(a: Array) -> Array:
        padded = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, slices, length, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def piece(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        piece_hidden, piece_targets, piece_mask = part
        logits = model.logits(piece_hidden)
        picked = jnp.take_along_axis(logits, piece_targets[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - picked
        return total + (nll * piece_mask.astype(nll.dtype)).sum(), None

    start = jnp.zeros((), accumulation_dtype(hidden))
    if slices == 1:
        return piece(start, (hidden, targets, mask))[0]
    return jax.lax.scan(piece, start, (cut(hidden), cut(targets), cut(mask)))[0]


def head_error(
    student: Float[Array, "B T N H"], teacher: Float[Array, "B T N H"], segment_ids: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over real positions of the mean squared error of the head outputs (before o_proj), fp32."""
    dtype = accumulation_dtype(student)
    error = jnp.square(student.astype(dtype) - teacher.astype(dtype)).mean(axis=(-2, -1))
    return jnp.where(segment_ids != 0, error, 0.0).sum()
