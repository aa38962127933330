"""The losses: next-token cross-entropy, KL to the teacher's predictions, and the error of a layer's head outputs."""

import jax
import jax.numpy as jnp

from lizard_jax.models.llama import Llama
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import partition

LOGITS_AT_ONCE = 2**26
"""Logits of a device kept in memory at a time; the rest is recomputed, so that a vocabulary of 128k costs no 8 GB.

Every slice reads the head again: with half as many at a time, a twelfth of what an 8B model's step read was that. Twice
as many do not fit a v5e beside it.
"""


def cross_entropy(
    model: Llama, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], mask: Float[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over unmasked positions of −log p(target), in nats, fp32.

    Logits are formed for a slice of the sequence at a time and formed again in the backward pass.
    """
    return prediction_losses(model, hidden, targets, mask)[0]


def prediction_losses(
    model: Llama,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    teacher_hidden: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over unmasked positions, in nats, fp32: −log p(target), and KL(teacher ‖ student) over the whole vocabulary.

    The teacher's final hidden states pass through the same head, which no stage that has a teacher inside trains; no
    gradient reaches them. Without them KL is 0. Logits of both are formed for a slice of the sequence at a time and
    formed again in the backward pass, so that the exact KL needs no more memory than the cross-entropy.
    """
    batch, time, _ = hidden.shape
    both = 1 if teacher_hidden is None else 2
    # On a mesh the head is gathered once, before the slices, and a device holds the logits of its own rows.
    head, rows = partition.by_columns(model.head()), batch // partition.row_parts(batch)
    parts = partition.time_parts(time)
    own, slices = time // parts, 1
    while slices < own and (both * rows * own * model.config.vocab_size) // slices > LOGITS_AT_ONCE:
        slices *= 2
    length = -(-own // slices)
    pad = slices * length - own

    def cut(a: Array) -> Array:
        """Every slice has some tokens of every device."""
        late = a.shape[2:]
        padded = jnp.pad(a.reshape(batch, parts, own, *late), [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * len(late))
        sliced = jnp.moveaxis(padded.reshape(batch, parts, slices, length, *late), 2, 0)
        return sliced.reshape(slices, batch, parts * length, *late)

    @jax.checkpoint
    def piece(totals: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        piece_hidden, piece_targets, piece_mask, *teacher = map(partition.by_tokens, part)
        log_p = jax.nn.log_softmax(model.logits(piece_hidden, head))
        weight = piece_mask.astype(log_p.dtype)
        nll = -jnp.take_along_axis(log_p, piece_targets[..., None], axis=-1)[..., 0]
        kl = jnp.zeros_like(nll)
        if teacher:
            log_t = jax.lax.stop_gradient(jax.nn.log_softmax(model.logits(teacher[0], head)))
            kl = (jnp.exp(log_t) * (log_t - log_p)).sum(-1)
        return (totals[0] + (nll * weight).sum(), totals[1] + (kl * weight).sum()), None

    zero = jnp.zeros((), accumulation_dtype(hidden))
    whole = (hidden, targets, mask, *(() if teacher_hidden is None else (teacher_hidden,)))
    if slices == 1:
        return piece((zero, zero), whole)[0]
    return jax.lax.scan(piece, (zero, zero), tuple(cut(a) for a in whole))[0]


def head_error(
    student: Float[Array, "B T N H"], teacher: Float[Array, "B T N H"], segment_ids: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Sum over real positions of the mean squared error of the head outputs (before o_proj), fp32."""
    dtype = accumulation_dtype(student)
    error = jnp.square(student.astype(dtype) - teacher.astype(dtype)).mean(axis=(-2, -1))
    return jnp.where(segment_ids != 0, error, 0.0).sum()


def head_power(teacher: Float[Array, "B T N H"], segment_ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Sum over real positions of the mean square of the teacher's head outputs, fp32: the scale of ``head_error``."""
    return head_error(jnp.zeros_like(teacher), teacher, segment_ids)
