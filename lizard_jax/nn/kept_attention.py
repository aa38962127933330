"""Lizard attention where some of what leaves the window stays exact: ``kept_pairs`` between window and memory."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lizard_jax.nn.context import Blocks, Context, Near
from lizard_jax.nn.kept_pairs import KeptPairs, Sizes, aligned, filled, read, read_one, turn, unaligned
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.rope import cos_sin, inverse_frequencies, rotate
from lizard_jax.typing import Array, Float
from pallas_kernels.log_gate_attention import LinearState, log_gate_step, mapped_log_gate_attention
from pallas_kernels.numerics import EMPTY
from pallas_kernels.sliding_window import meta

if TYPE_CHECKING:
    from lizard_jax.nn.lizard_attention import LizardMixer


def near_with_pairs(
    context: Context,
    sizes: Sizes,
    *,
    frequencies: Float[Array, " H/2"] | None,
    sink: Float[Array, " N"] | None,
    learned: tuple[Float[Array, "M K H"], Float[Array, "M K H"]] | None,
) -> Near:
    """Window, meta memory and kept pairs of every query as one softmax."""
    state, lengths, q = context.state, context.lengths, context.q
    (batch, time), wide = q.shape[:2], accumulation_dtype(q)
    assert state.pairs is not None
    asks, positions = context.segments != 0, context.positions
    beside = meta.beside(
        q, context.segments, positions, window=sizes.window, frequencies=frequencies, sink=sink, learned=learned,
        prefix=context.prefix, last=sizes.reach - 1,
    )  # fmt: skip
    # Of a whole text, documents begin where their positions do; a state has one, that began at 0.
    begins = jnp.arange(time, dtype=jnp.int32) + state.position[:, None] - positions
    past = jnp.where(context.k_segments[:, : sizes.window] != 0, 0, -1)
    start = jnp.concatenate([past, jnp.where(asks, begins, -1)], axis=1)
    if time == 1 and lengths is not None:
        found, pairs = read_one(
            q, context.all_k, context.all_v, start, asks, state.position, beside[1], state.pairs, frequencies, sizes
        )
        offset = jnp.zeros((batch,), jnp.int32)
        blocks = Blocks(offset, q, context.all_k, context.all_v, positions, start, asks, found)
    else:
        offset = state.position % sizes.block
        # Where in its block a row goes on is not known beforehand, and may cost a block more.
        slots = -(-time // sizes.block) * sizes.block + (0 if lengths is None else sizes.block)

        def moved(a: Array, size: int = slots) -> Array:
            return filled(a, size) if lengths is None else aligned(a, offset, size)

        all_k, all_v = (moved(a, sizes.window + slots) for a in (context.all_k, context.all_v))
        start = moved(start + 1, sizes.window + slots) - 1
        moved_q, moved_asks = moved(q), moved(asks)
        near = jax.vmap(_placed, in_axes=(0, 0, None))(state.pairs.near, offset, sizes.block)
        begin = state.position - offset
        found, pairs, near = read(
            moved_q, all_k, all_v, start, moved_asks, begin, moved(beside[1]), state.pairs, near, frequencies, sizes,
            context.limits,
        )  # fmt: skip
        if lengths is not None:
            # The last W tokens of each row, from the keys of the last block that it reached.
            end = state.position + lengths
            at = end - jnp.where(lengths > 0, (end - 1) // sizes.block * sizes.block, begin)
            near = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, sizes.window, axis=1))(near, at)
            pairs = KeptPairs(pairs.k, pairs.v, pairs.index, pairs.score, near)
        blocks = Blocks(offset, moved_q, all_k, all_v, moved(positions), start, moved_asks, found)
    exact, exact_log = (unaligned(a, offset, time).astype(wide) for a in (found.near, found.near_log))
    heads, log = meta.merge([beside, (exact, exact_log)], context.v.dtype)
    log = jnp.where(asks[..., None], log, EMPTY)
    return Near(jnp.where(asks[..., None, None], heads, jnp.zeros((), heads.dtype)), log, pairs, blocks)


def _placed(row: Float[Array, "K W"], at: Array, more: int) -> Float[Array, "K WC"]:
    """The row with ``more`` zeros around it, ``at`` of them in front."""
    wider = jnp.zeros((row.shape[0], row.shape[1] + more), row.dtype)
    return jax.lax.dynamic_update_slice_in_dim(wider, row, at, axis=1)


def far_with_pairs(
    mixer: "LizardMixer", context: Context, blocks: Blocks
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"], LinearState]:
    """The linear branch over whole blocks, each with the pairs that lost their place in front of it.

    They are tokens that nobody asks from and that forget nothing. Returns what ``LizardMixer._linear`` does.
    """
    switches, (batch, time) = mixer.switches, blocks.q.shape[:2]
    window, group = switches.window, mixer.state_heads // mixer.config.kv_heads
    found, linear = blocks.found, context.state.linear
    assert mixer.phi_q is not None
    assert mixer.phi_k is not None
    assert linear is not None
    own = blocks.start[:, window:]
    present = blocks.asks & (blocks.start[:, :time] == own)
    if switches.meta == "prefix":
        present &= blocks.positions - window >= switches.meta_tokens
    enters = present[:, None] & ~found.stays  # [B, K, U]
    to_q, to_k, source_v = blocks.q, blocks.all_k[:, :time], blocks.all_v[:, :time]
    count, lost = found.lost_k.shape[1], found.lost_k.shape[3]
    lost_k, lost_v, lost_index = (jnp.moveaxis(a, 2, 3) for a in (found.lost_k, found.lost_v, found.lost_index))
    first = own.reshape(batch, count, -1)[:, :, 0]  # where the document of each block's first query begins
    if switches.linear_rope:
        frequencies = inverse_frequencies(mixer.config.rope, mixer.config.head_dim)
        to_q = rotate(to_q, *cos_sin(frequencies, blocks.positions))
        to_k = rotate(to_k, *cos_sin(frequencies, blocks.positions - window))
        lost_k = turn(lost_k, *cos_sin(frequencies, lost_index - first[:, :, None, None]))
    log_gate = context.log_gate
    assert log_gate is not None
    if log_gate.shape[1] != time:
        log_gate = filled(log_gate, time) if context.lengths is None else aligned(log_gate, blocks.offset, time)
    log_gate = jnp.where(blocks.asks.reshape(batch, time, *(1,) * (log_gate.ndim - 2)), log_gate, 0.0)
    key_scale = jnp.where(jnp.moveaxis(enters, 1, 2), 0.0, EMPTY).repeat(group, -1)
    lost_scale = jnp.where(lost_index >= 0, 0.0, EMPTY).repeat(group, -1)
    maps: dict[str, Any] = {
        "q_map": mixer.phi_q.kernel[...], "k_map": mixer.phi_k.kernel[...], "act": switches.act,
        "return_log_normalizer": True, "return_final_state": True, "chunk": switches.chunk,
    }  # fmt: skip
    if time == 1:

        def absorbed(linear: LinearState) -> LinearState:
            return mapped_log_gate_attention(
                jnp.zeros((batch, lost, *to_q.shape[2:]), to_q.dtype), lost_k[:, 0], lost_v[:, 0],
                jnp.zeros((batch, lost, *log_gate.shape[2:]), log_gate.dtype), k_log_scale=lost_scale[:, 0],
                initial_state=linear, **maps,
            )[2]  # fmt: skip

        linear = jax.lax.cond((lost_index >= 0).any(), absorbed, lambda linear: linear, linear)
        (q_feat, q_log_scale), (k_feat, scale) = mixer.phi_q(to_q), mixer.phi_k(to_k)
        far, far_log, linear = log_gate_step(
            q_feat[:, 0], k_feat[:, 0], source_v[:, 0], log_gate[:, 0],
            k_log_scale=jnp.where(key_scale == 0.0, scale, EMPTY)[:, 0], state=linear,
        )  # fmt: skip
        return far[:, None], far_log[:, None] + q_log_scale, linear

    def in_front(lost: Array, slots: Array) -> Array:
        """The lost pairs of each block before its slots, as one sequence."""
        both = jnp.concatenate([lost, slots.reshape(batch, count, -1, *slots.shape[2:])], axis=2)
        return both.reshape(batch, -1, *both.shape[3:])

    def nothing(slots: Array) -> Array:
        return jnp.zeros((batch, count, lost, *slots.shape[2:]), slots.dtype)

    # A document is known by where it begins; a lost pair is of the one that its block begins in.
    ids = jnp.where(blocks.asks, own + 1, 0)
    of_lost = jnp.broadcast_to(ids.reshape(batch, count, -1)[:, :, :1], (batch, count, lost))
    far, far_log, linear = mapped_log_gate_attention(
        in_front(nothing(to_q), to_q), in_front(lost_k, to_k), in_front(lost_v, source_v),
        in_front(nothing(log_gate), log_gate), k_log_scale=in_front(lost_scale, key_scale),
        initial_state=linear, segment_ids=in_front(of_lost, ids), **maps,
    )  # fmt: skip

    def slots_of(a: Array) -> Array:
        slots = a.reshape(batch, count, -1, *a.shape[2:])[:, :, lost:].reshape(batch, time, *a.shape[2:])
        return unaligned(slots, blocks.offset, context.q.shape[1])

    return slots_of(far), slots_of(far_log), linear
