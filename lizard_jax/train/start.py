"""Where stage 1 starts from: gates and β by what a little training text says, so that memory begins as far as it helps.

The frozen teacher reads the text once. At each layer the linear branch is run with every candidate age of the gates,
and merged with the window at every candidate share; each state head takes the age, and each query head the share, whose
head outputs come closest to the teacher's. The least share is next to none, so that a memory which does not help yet
leaves the student its window. No gradient, no step: a *training-free student*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lizard_jax import sharding
from lizard_jax.config import LizardConfig
from lizard_jax.data.loader import Batch
from lizard_jax.models.llama import Block, Llama
from lizard_jax.nn.lizard_attention import LizardMixer
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.params import NewParam
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.nn.split_attention import students_of
from lizard_jax.typing import Array, Float, Int
from pallas_kernels.numerics import ABSENT

AGES = (0.5, 2.0, 8.0, 64.0)
"""Candidates for the mean age of what a state holds, in windows: a gate of bias b forgets one part in e^b a token."""
SHARES = (0.001, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7)
"""Candidates for a memory's share of a query's softmax (at the mean of its log-odds)."""
TOKENS = 8192
"""Tokens of text that start values are measured on."""


@dataclass(frozen=True)
class Start:
    """What was chosen.

    Attributes:
        age: ``[L, S]`` mean age of what each state head holds, in tokens; NaN where the gate has no bias to choose.
        share: ``[L, N]`` share of each query head's softmax that its memory starts with.
        error: ``[L]`` relative error of the head outputs with these values, and ``window_error`` with the window alone.

    Layers that keep softmax attention have no row, and key heads that do no number: their layer's row ends with NaN.
    """

    age: Float[np.ndarray, "L S"]
    share: Float[np.ndarray, "L N"]
    error: Float[np.ndarray, " L"]
    window_error: Float[np.ndarray, " L"]

    def summary(self) -> str:
        """The line that the log shows."""
        ages = "" if np.isnan(self.age).all() else f"mean age {np.nanmedian(self.age):.0f} tokens, "
        return (
            f"start: {ages}memory's share {np.nanmean(self.share):.1%}; relative error of heads "
            f"{self.error.mean():.4f} (window alone {self.window_error.mean():.4f})"
        )


def measures(switches: LizardConfig | None) -> bool:
    """Whether these switches have start values to measure: a memory that is merged with the window by β."""
    return (
        switches is not None and switches.measured_start and switches.memory != "none" and switches.combine == "joint"
    )


def measure_start(model: Llama, batches: Sequence[Batch]) -> Start:
    """Sets the gates' biases and β of every Lizard layer, in place, and says what was chosen.

    Args:
        model: the teacher's weights with new modules; ``measures(model.config.attention)`` must hold.
        batches: text, of one shape, on the devices that the model lies on.
    """
    segments = [jnp.asarray(batch.segment_ids) for batch in batches]
    hidden = [jax.block_until_ready(model.embed(jnp.asarray(batch.inputs))) for batch in batches]
    # Functions of this call alone: what is traced depends on the mesh that kernels are split over.
    probe, teach = jax.jit(lambda *args: _probe(*args)), jax.jit(lambda *args: _teach(*args))
    rows = []
    for index, block in enumerate(model.layers):
        students, seen = students_of(block.attention.mixer), []
        frozen = _as_teacher(block, SoftmaxMixer(model.config, index))
        for n, segment_ids in enumerate(segments):
            read, taught, hidden[n] = jax.block_until_ready(teach(frozen, hidden[n], segment_ids))
            seen.append((read, taught))
        chosen = []
        for student in students:
            mixer = student.mixer
            biases = _biases(mixer)
            ages = 1 if biases is None else len(biases)
            offsets: Array = jnp.full((ages, mixer.config.num_heads), jnp.nan, accumulation_dtype(hidden[0]))
            total = None
            for ((normed, *qkv), taught), segment_ids in zip(seen, segments, strict=True):
                inputs, target = (normed, *student.part(*qkv)), student.heads(taught)
                # One at a time: collectives of several programs in flight can starve each other on virtual devices.
                found = jax.block_until_ready(probe(mixer, biases, offsets, inputs, target, segment_ids))
                offsets, sums = found
                total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            assert total is not None
            chosen.append(_choose(mixer, biases, *sharding.on_host((offsets, total))))
        if chosen:
            rows.append(_layer(chosen))
    return Start(*(_stacked(column) for column in zip(*rows, strict=True)))


def _as_teacher(block: Block, mixer: SoftmaxMixer) -> Block:
    """The block with softmax attention. All layers are then of one kind, whatever their heads keep, and share what is
    compiled."""
    out: Block = nnx.merge(*nnx.split(block))
    out.attention.mixer = mixer
    return out


def _teach(
    block: Block, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]
) -> tuple[tuple[Array, Array, Array, Array], Float[Array, "B T N H"], Float[Array, "B T D"]]:
    """What the layer's attention reads, the teacher's head outputs, and its next hidden state."""
    normed = block.attention_norm(x)
    q, k, v = block.attention.qkv(normed)
    taught = block.attention.mixer(normed, q, k, v, segment_ids=segment_ids)
    return (normed, q, k, v), taught, block.after_heads(x, taught)


def _layer(chosen: Sequence["_Chosen"]) -> tuple[np.ndarray, np.ndarray, float, float]:
    """A layer's row of ``Start``, of the classes of its heads."""
    power = max(sum(one.power for one in chosen), float(np.finfo(np.float32).tiny))
    ages, shares = np.concatenate([one.age for one in chosen]), np.concatenate([one.share for one in chosen])
    return ages, shares, sum(one.error for one in chosen) / power, sum(one.window for one in chosen) / power


def _stacked(column: Sequence[Any]) -> np.ndarray:
    """A row a layer; layers that keep heads have fewer, and NaN for the rest."""
    longest = max(np.size(row) for row in column)
    rows = [np.pad(np.ravel(row), (0, longest - np.size(row)), constant_values=np.nan) for row in column]
    return np.stack(rows) if np.ndim(column[0]) else np.concatenate(rows)


def _biases(mixer: LizardMixer) -> Float[Array, " ages"] | None:
    """The candidate biases, ``ln`` of the ages in tokens; None for gates without one."""
    if mixer.gate is None or mixer.gate.kind != "scalar" or mixer.gate.bias is None:
        return None
    return jnp.log(jnp.asarray(AGES, jnp.float32) * mixer.switches.window)


def _probe(
    mixer: LizardMixer,
    biases: Float[Array, " ages"] | None,
    offsets: Float[Array, "ages N"],
    inputs: tuple[Array, Array, Array, Array],
    target: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Array, dict[str, Array]]:
    """One student on one batch: the log-odds that were used, and sums of squared errors ``[ages, shares, N]``.

    ``offsets`` is the mean log-odds of the window against the memory before β, of each age and query head; NaN has it
    measured here. ``inputs`` are x, q, k, v of the student's heads, ``target`` the teacher's outputs of them.
    """
    parts = nnx.split(mixer)
    wide = accumulation_dtype(target)
    real = (segment_ids != 0)[..., None]

    def squares(a: Array) -> Array:
        return jnp.where(real, jnp.square(a.astype(wide)).sum(-1), 0.0).sum((0, 1))

    # The exact part knows nothing of gates: it is computed once and not for every candidate.
    near = _with(parts).near(*inputs, segment_ids=segment_ids)

    def candidate(bias: Array | None, offset: Array) -> tuple[Array, Array]:
        branches = _with(parts, bias=bias).branches(*inputs, segment_ids=segment_ids, near=near)
        assert branches.far_log is not None
        there = real & (branches.far_log > ABSENT)
        odds = jnp.where(there, branches.near_log - branches.far_log, 0.0).sum((0, 1))
        measured = odds / jnp.maximum(there.sum((0, 1)), 1).astype(odds.dtype)
        offset = jnp.where(jnp.isnan(offset), measured, offset)

        def error(share: Array) -> Array:
            merging = _with(parts, beta=offset + _log_odds(share))
            return squares(merging.combine(branches, inputs[1], segment_ids).astype(wide) - target.astype(wide))

        return offset, jax.lax.map(error, jnp.asarray(SHARES, wide))

    if biases is None:
        offset, errors = (a[None] for a in candidate(None, offsets[0]))
    else:
        offset, errors = jax.lax.map(lambda pair: candidate(*pair), (biases, offsets))
    alone = squares(near.heads.astype(wide) - target.astype(wide))
    return offset, {"errors": errors, "window": alone, "power": squares(target)}


def _with(parts: Any, *, bias: Array | None = None, beta: Array | None = None) -> LizardMixer:
    """The mixer of ``parts`` with one bias for all gates, or with these β; made anew, for traces cannot change it."""
    mixer: LizardMixer = nnx.merge(*parts)
    if bias is not None:
        assert mixer.gate is not None
        assert mixer.gate.bias is not None
        mixer.gate.bias = NewParam(jnp.full_like(mixer.gate.bias[...], bias))
    if beta is not None:
        assert mixer.beta is not None
        mixer.beta = NewParam(beta.astype(mixer.beta.dtype))
    return mixer


def _log_odds(share: Array) -> Array:
    return jnp.log(share) - jnp.log1p(-share)


@dataclass(frozen=True)
class _Chosen:
    """Of one class of heads: the ages and shares chosen, the sum of squared errors with them and with the window alone,
    and of the teacher's squares."""

    age: Float[np.ndarray, " S"]
    share: Float[np.ndarray, " N"]
    error: float
    window: float
    power: float


def _choose(mixer: LizardMixer, biases: Array | None, offsets: np.ndarray, sums: dict[str, np.ndarray]) -> _Chosen:
    """Writes the best candidates into the mixer."""
    assert mixer.beta is not None
    errors = sums["errors"]  # [ages, shares, N]
    ages, _, heads = errors.shape
    group = heads // mixer.state_heads
    age = errors.min(axis=1).reshape(ages, mixer.state_heads, group).sum(axis=-1).argmin(axis=0)  # [S]
    by_head, head = np.repeat(age, group), np.arange(heads)
    share = errors[by_head, :, head].argmin(axis=1)  # [N]
    shares = np.asarray(SHARES)[share]
    beta = offsets[by_head, head] + np.log(shares) - np.log1p(-shares)
    mixer.beta[...] = jnp.asarray(beta, mixer.beta.dtype)
    chosen = np.full(mixer.state_heads, np.nan)
    if biases is not None:
        assert mixer.gate is not None
        assert mixer.gate.bias is not None
        bias = np.asarray(biases)[age]
        mixer.gate.bias[...] = jnp.asarray(bias, mixer.gate.bias.dtype)
        chosen = np.exp(bias)
    return _Chosen(
        chosen, shares, float(errors[by_head, share, head].sum()), float(sums["window"].sum()),
        float(sums["power"].sum()),
    )  # fmt: skip
