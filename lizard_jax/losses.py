"""The losses: next-token cross-entropy, KL to the teacher's predictions, and the error of a layer's head outputs."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lizard_jax.models.llama import Llama, logits_of
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import partition

LOGITS_AT_ONCE = 2**26
"""Logits of a device kept in memory at a time, so that a vocabulary of 128k costs no 8 GB.

Every slice reads the head again. By a chip's peaks Llama-3's takes about as long to read as to multiply with the 256
rows that this makes; with half as many reading takes longer, and twice as many take a GiB more of a v5e.
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

    The teacher's final hidden states pass through the same head; no gradient reaches them. Without them KL is 0. Logits
    of both are formed for a slice of the sequence at a time and formed again in the backward pass, so that the exact KL
    needs no more memory than the cross-entropy.
    """
    slices, head = _slices(hidden, model, teacher_hidden), partition.by_columns(model.head())

    @jax.checkpoint
    def piece(totals: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        nll, kl = _sums(head, *part)
        return (totals[0] + nll, totals[1] + kl), None

    return slices.over(piece, hidden, targets, mask, teacher_hidden)[0]


def frozen_head_loss(
    model: Llama,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    teacher_hidden: Float[Array, "B T D"] | None = None,
    *,
    kl_share: float = 0.0,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Means over unmasked positions of ``(1 - kl_share) nll + kl_share KL`` and of both parts, in nats, fp32.

    For a head that is not trained, with a gradient for ``hidden`` of the first number alone. It is computed slice by
    slice while the logits are there, so they are formed once: what ``prediction_losses`` takes five products with the
    head for, two of them in the backward pass over again, takes three.
    """
    slices, head = _slices(hidden, model, teacher_hidden), partition.by_columns(model.head())
    return _frozen_head_loss((slices, kl_share), hidden, head, targets, mask, teacher_hidden)


@dataclass(frozen=True)
class _Slices:
    """How the tokens of a batch are cut, for so many logits at a time.

    Attributes:
        count: of slices; each has some tokens of every device.
        length: tokens of a slice that one device has of a text; what fills the last one up counts for nothing.
        parts: devices that share a text.
    """

    count: int
    length: int
    parts: int

    def over(self, piece, *whole: Array | None) -> tuple[tuple[Array, Array], Array | None]:
        """``piece(totals, part) -> (totals, y)`` over the slices of these arrays: both totals, and the ys in the shape
        of the first array."""
        arrays = tuple(a for a in whole if a is not None)
        wide = accumulation_dtype(arrays[0])
        zeros = jnp.zeros((), wide), jnp.zeros((), wide)
        if self.count == 1:
            return piece(zeros, arrays)
        totals, y = jax.lax.scan(piece, zeros, tuple(map(self._cut, arrays)))
        return totals, None if y is None else self._joined(y, arrays[0])

    def _cut(self, a: Array) -> Array:
        own, late = a.shape[1] // self.parts, a.shape[2:]
        pad = [(0, 0), (0, 0), (0, self.count * self.length - own)] + [(0, 0)] * len(late)
        padded = jnp.pad(a.reshape(len(a), self.parts, own, *late), pad)
        sliced = jnp.moveaxis(padded.reshape(len(a), self.parts, self.count, self.length, *late), 2, 0)
        return sliced.reshape(self.count, len(a), self.parts * self.length, *late)

    def _joined(self, y: Array, like: Array) -> Array:
        """The inverse."""
        batch, time, *late = like.shape
        apart = jnp.moveaxis(y.reshape(self.count, batch, self.parts, self.length, *late), 0, 2)
        return apart.reshape(batch, self.parts, -1, *late)[:, :, : time // self.parts].reshape(like.shape)


def _slices(hidden: Array, model: Llama, teacher_hidden: Array | None) -> _Slices:
    """On a mesh the head is gathered once, before the slices, and a device holds the logits of its own rows."""
    batch, time, _ = hidden.shape
    rows, parts = batch // partition.row_parts(batch), partition.time_parts(time)
    logits = (1 if teacher_hidden is None else 2) * rows * (time // parts) * model.config.vocab_size
    count = 1
    while count < time // parts and logits // count > LOGITS_AT_ONCE:
        count *= 2
    return _Slices(count, -(-(time // parts) // count), parts)


def _sums(
    head: Array, hidden: Array, targets: Array, mask: Array, teacher_hidden: Array | None = None
) -> tuple[Array, Array]:
    """Both sums of ``prediction_losses`` over a slice."""
    hidden, targets, mask = map(partition.by_tokens, (hidden, targets, mask))
    log_p = jax.nn.log_softmax(logits_of(hidden, head))
    weight = mask.astype(log_p.dtype)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    kl = jnp.zeros_like(nll)
    if teacher_hidden is not None:
        log_t = jax.lax.stop_gradient(jax.nn.log_softmax(logits_of(partition.by_tokens(teacher_hidden), head)))
        kl = (jnp.exp(log_t) * (log_t - log_p)).sum(-1)
    return (nll * weight).sum(), (kl * weight).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_head_loss(how, hidden, head, targets, mask, teacher_hidden):
    return _with_gradient(how, hidden, head, targets, mask, teacher_hidden)[0]


def _with_gradient(how, hidden, head, targets, mask, teacher_hidden):
    slices, share = how
    count = jnp.maximum(mask.sum().astype(accumulation_dtype(hidden)), 1.0)

    def piece(totals, part):
        own, *rest = part

        def loss(own):
            nll, kl = _sums(head, own, *rest)
            return ((1.0 - share) * nll + share * kl) / count, (nll, kl)

        gradient, (nll, kl) = jax.grad(loss, has_aux=True)(own)
        return (totals[0] + nll, totals[1] + kl), gradient

    (nll, kl), gradient = slices.over(piece, hidden, targets, mask, teacher_hidden)
    nll, kl = nll / count, kl / count
    return ((1.0 - share) * nll + share * kl, (nll, kl)), gradient


def _gradient(how, gradient, cotangents):
    return gradient * cotangents[0].astype(gradient.dtype), None, None, None, None


_frozen_head_loss.defvjp(_with_gradient, _gradient)


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
