"""Rotary position embedding as transformers computes it, and positions inside packed documents."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lizard_jax.config import RopeConfig
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.typing import Array, Float, Int


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, *, length: int | Int[Array, "..."] | None = None
) -> Float[Array, "... H/2"]:
    """The angle each pair of features turns per position: ``θ^(−2i/H)`` for pair i, scaled as ``rope.kind`` says.

    ``linear`` divides every frequency by the factor. ``llama3`` divides only those whose wavelength exceeds the
    original context, with a smooth step between. ``dynamic`` grows θ with the length of the text:
    ``θ (factor·L/L₀ − factor + 1)^(H/(H−2))`` for ``L = max(length, L₀)``, ``L₀`` the original context. ``yarn``
    divides by the factor what turns seldom in the original context and leaves what turns often, with a ramp over the
    pairs between. ``longrope`` divides each pair by a factor of its own, one in texts within the original context and
    another in longer ones.

    Args:
        length: tokens in the text; only ``dynamic`` and ``longrope`` read it, and None gives the frequencies of texts
            within the original context. An array of lengths gives one set of frequencies for each.

    Returns:
        float32, ``[H/2]``, with the axes of ``length`` in front where that is an array and the kind reads it.
    """
    powers = np.arange(0, head_dim, 2) / head_dim
    if rope.kind == "dynamic" and length is not None:
        base_length = rope.original_max_positions
        if isinstance(length, int):
            growth = rope.factor * max(length, base_length) / base_length - (rope.factor - 1)
            theta = rope.theta * growth ** (head_dim / (head_dim - 2))
        else:
            longest = jnp.maximum(length, base_length).astype(jnp.float32)
            growth = rope.factor * longest / base_length - (rope.factor - 1)
            theta = (rope.theta * growth ** (head_dim / (head_dim - 2)))[..., None]
            return 1.0 / theta ** jnp.asarray(powers, jnp.float32)
        return jnp.asarray(1.0 / theta**powers, jnp.float32)

    frequencies = 1.0 / rope.theta**powers
    if rope.longrope is not None:
        short, long = (
            jnp.asarray(frequencies / np.asarray(factors), jnp.float32)
            for factors in (rope.longrope.short, rope.longrope.long)
        )
        if length is None or isinstance(length, int):
            return long if length is not None and length > rope.original_max_positions else short
        return jnp.where((length > rope.original_max_positions)[..., None], long, short)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_positions * frequencies / (2 * math.pi)  # in the original context
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        frequencies = frequencies * (smooth + (1 - smooth) / rope.factor)
    elif rope.kind == "yarn":
        assert rope.yarn is not None
        # The pair, as a fraction of the width, that turns so often in the original context.
        ends = [
            head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
            for turns in (rope.yarn.beta_fast, rope.yarn.beta_slow)
        ]
        if rope.yarn.truncate:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
        frequencies = frequencies * (1 - ramp + ramp / rope.factor)
    return jnp.asarray(frequencies, jnp.float32)


def query_scale(rope: RopeConfig) -> float:
    """What queries are multiplied by instead of scaling cos and sin of both sides, as ``yarn`` and ``longrope`` ask."""
    scaled = rope.yarn or rope.longrope
    return 1.0 if scaled is None else scaled.attention_factor**2


def cos_sin(
    inv_freq: Float[Array, "... H/2"], positions: Int[Array, "..."]
) -> tuple[Float[Array, "... H/2"], Float[Array, "... H/2"]]:
    """``cos(p f)`` and ``sin(p f)`` in float32 for every position p and frequency f."""
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "... T N H"], cos: Float[Array, "... T H/2"], sin: Float[Array, "... T H/2"]
) -> Float[Array, "... T N H"]:
    """Turns feature pairs ``(i, i + H/2)`` of every head by the angles of its position.

    Computed in float32 (float64 for float64 ``x``) and rounded once to the dtype of ``x``.
    """
    wide = accumulation_dtype(x)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    cos, sin = cos[..., None, :].astype(wide), sin[..., None, :].astype(wide)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The index at which the run of equal ids each token belongs to begins. Two runs of one id stay two documents."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    changed = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return jax.lax.cummax(jnp.where(changed, index, 0), axis=1)


def segment_lengths(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of tokens in the run of equal ids each token belongs to."""
    total = segment_ids.shape[1]
    index = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), segment_ids.shape)
    last = jnp.diff(segment_ids, axis=1, append=segment_ids[:, -1:]) != 0
    ends = jax.lax.cummin(jnp.where(last, index, total - 1), axis=1, reverse=True)
    return ends - segment_starts(segment_ids) + 1


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each token's position in its document, counted from 0; 0 for padding (id 0)."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return jnp.where(segment_ids == 0, 0, index - segment_starts(segment_ids))
