"""Exact pairs that a key head keeps of what has left its window, chosen by the attention they received.

The past of a query is four disjoint sets: the first tokens, the last W, the kept pairs E (at most X a key head), and
all the rest in the gated state. Time is cut into blocks of C queries that share one choice. At a block's border, the
tokens that will leave the window during it compete with E for its places: those stay that received most attention so
far, summed over the key head's query heads, of the exact part alone, and faded at each border. A token that loses as it
leaves enters the state then; one that loses its place later enters it at that border, and decays from there.

The choice reads the past alone and carries no gradient. Borders lie at multiples of C of the sequence, packed documents
included; a pair is seen by queries of its own document only.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.rope import cos_sin, rotate
from lizard_jax.typing import Array, Bool, Float, Int, Shaped
from pallas_kernels.numerics import EMPTY

FADE = 0.9
"""What a border leaves of the attention received before it (benchmarks/kept.py)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeptPairs:
    """E and what decides about it.

    Attributes:
        k, v: ``[B, K, X, H]`` unrotated.
        index: ``[B, K, X]`` int32, where in the sequence they stood; -1 where there is none.
        score: ``[B, K, X]`` attention received, fp32.
        near: ``[B, K, W]`` the same of the last W tokens.
    """

    k: Float[Array, "B K X H"]
    v: Float[Array, "B K X H"]
    index: Int[Array, "B K X"]
    score: Float[Array, "B K X"]
    near: Float[Array, "B K W"]


def no_pairs(batch: int, kv_heads: int, kept: int, window: int, head_dim: int, dtype: jnp.dtype) -> KeptPairs:
    """The choice of the empty past."""
    wide = accumulation_dtype(jnp.zeros((), dtype))
    shape = (batch, kv_heads, kept)
    return KeptPairs(
        jnp.zeros((*shape, head_dim), dtype), jnp.zeros((*shape, head_dim), dtype), jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape, wide), jnp.zeros((batch, kv_heads, window), wide),
    )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What is fixed of a choice.

    Attributes:
        window: W.
        block: C, the chunk or W where that is less: a choice is made before its tokens leave the window.
        prefix: first tokens of a document, which never compete.
        reach: the most a distance is told apart; a key further away is turned as if it stood there.
    """

    window: int
    block: int
    prefix: int
    reach: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Read:
    """What window and pairs gave a stretch of blocks, and what it took from E and let into it.

    Attributes:
        near: ``[B, T, N, H]`` softmax over window and pairs, unrounded; ``near_log`` ``[B, T, N]`` its log-normalizer.
        stays: ``[B, K, T]`` the token that leaves the window as this slot's arrives has a place in E.
        lost_k, lost_v: ``[B, blocks, K, L, H]`` pairs that lost their place at each block's border, unrotated.
        lost_index: ``[B, blocks, K, L]`` where they stood; -1 where there is none.
    """

    near: Float[Array, "B T N H"]
    near_log: Float[Array, "B T N"]
    stays: Bool[Array, "B K T"]
    lost_k: Float[Array, "B blocks K L H"]
    lost_v: Float[Array, "B blocks K L H"]
    lost_index: Int[Array, "B blocks K L"]


def read(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B WT K H"],
    v: Float[Array, "B WT K H"],
    start: Int[Array, "B WT"],
    asks: Bool[Array, "B T"],
    begin: Int[Array, " B"],
    other: Float[Array, "B T N"],
    pairs: KeptPairs,
    near: Float[Array, "B K WC"],
    frequencies: Float[Array, " H/2"] | None,
    sizes: Sizes,
    limits: Int[Array, " K"] | None = None,
) -> tuple[Read, KeptPairs, Float[Array, "B K WC"]]:
    """Reads whole blocks: T is a multiple of C, and ``begin``, the first slot's place in the sequence, too.

    Args:
        q, k, v: unrotated; keys from W before the first slot.
        start: where in the sequence the document of each key begins; -1 where there is no token.
        asks: the slots that hold a query. A block decides at its border if its first slot is one.
        other: log-normalizer of what each query meets beside window and pairs: first tokens, sinks.
        pairs: E before the first block; ``near`` in it is not read.
        near: attention received by the keys of the first block, W before it and its own.
        frequencies: of the rotation, None for none.
        limits: how many pairs each key head keeps, where some keep less than X.

    Returns:
        What was read; E after the last block that asks anything; and ``near`` of that block's keys after it.
    """
    time, block, window = q.shape[1], sizes.block, sizes.window
    count = time // block

    def cut(x: Array, number: Array, size: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, number * block, size, axis=1)

    def step(carry: tuple[KeptPairs, Array], number: Array) -> tuple[tuple[KeptPairs, Array], tuple[Array, ...]]:
        pairs, near = carry
        own = (cut(q, number, block), cut(asks, number, block), cut(other, number, block))
        keys = (cut(k, number, window + block), cut(v, number, window + block), cut(start, number, window + block))
        active = own[1].any(axis=1)
        # The keys of this block: those of the one before, moved on by a block.
        moved = jnp.pad(near[:, :, block:], ((0, 0), (0, 0), (0, block)))
        moved = jnp.where((active & (number > 0))[:, None, None], moved, near)
        chosen, moved, stays, lost = _choose(pairs, moved, keys, own[1][:, 0], begin + number * block, sizes, limits)
        y, n, received, received_pairs = _attend(own, keys, chosen, begin + number * block, frequencies, sizes)
        after = KeptPairs(chosen.k, chosen.v, chosen.index, chosen.score + received_pairs, pairs.near)
        near = jnp.where(active[:, None, None], moved + received, near)
        return (_where(active, after, pairs), near), (y, n, stays, *lost)

    (pairs, near), (y, n, stays, *lost) = jax.lax.scan(
        jax.checkpoint(step), (pairs, near), jnp.arange(count, dtype=jnp.int32)
    )

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], time, *x.shape[3:])

    lost_k, lost_v, lost_index = (jnp.moveaxis(x, 0, 1) for x in lost)
    stays = jnp.moveaxis(stays, 0, 2).reshape(*stays.shape[1:3], time)
    return Read(joined(y), joined(n), stays, lost_k, lost_v, lost_index), pairs, near


def read_one(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B W1 K H"],
    v: Float[Array, "B W1 K H"],
    start: Int[Array, "B W1"],
    asks: Bool[Array, "B 1"],
    begin: Int[Array, " B"],
    other: Float[Array, "B 1 N"],
    pairs: KeptPairs,
    frequencies: Float[Array, " H/2"] | None,
    sizes: Sizes,
) -> tuple[Read, KeptPairs]:
    """``read`` for one token a row, wherever its block stands; the pairs' own ``near`` is read and moved on."""
    border = asks[:, 0] & (begin % sizes.block == 0)
    chosen, near, _, lost = _choose(pairs, pairs.near, (k, v, start), border, begin, sizes)
    stays = (chosen.index == (begin - sizes.window)[:, None, None]).any(axis=-1, keepdims=True)
    y, n, received, received_pairs = _attend((q, asks, other), (k, v, start), chosen, begin, frequencies, sizes)
    near = (jnp.pad(near, ((0, 0), (0, 0), (0, 1))) + received)[:, :, 1:]
    after = KeptPairs(chosen.k, chosen.v, chosen.index, chosen.score + received_pairs, near)
    after = _where(asks[:, 0], after, pairs)
    lost_k, lost_v, lost_index = (x[:, None] for x in lost)
    return Read(y, n, stays, lost_k, lost_v, lost_index), after


def _where(rows: Bool[Array, " B"], new: KeptPairs, old: KeptPairs) -> KeptPairs:
    return jax.tree.map(lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


def aligned(x: Shaped[Array, "B T ..."], offset: Int[Array, " B"], size: int) -> Shaped[Array, "B size ..."]:
    """Each row moved right by its ``offset``, with zeros before and behind."""
    place = jnp.arange(size, dtype=jnp.int32) - offset[:, None]
    late = (1,) * (x.ndim - 2)
    taken = jnp.take_along_axis(x, jnp.clip(place, 0, x.shape[1] - 1).reshape(*place.shape, *late), axis=1)
    there = ((place >= 0) & (place < x.shape[1])).reshape(*place.shape, *late)
    return jnp.where(there, taken, jnp.zeros((), x.dtype))


def filled(x: Shaped[Array, "B T ..."], size: int) -> Shaped[Array, "B size ..."]:
    """``aligned`` of rows that all begin with a block."""
    return jnp.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def unaligned(x: Shaped[Array, "B size ..."], offset: Int[Array, " B"], time: int) -> Shaped[Array, "B T ..."]:
    """The ``time`` slots of each row from its ``offset`` on."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, time))(x, offset)


def _choose(
    pairs: KeptPairs,
    near: Float[Array, "B K WC"],
    keys: tuple[Array, Array, Array],
    border: Bool[Array, " B"],
    begin: Int[Array, " B"],
    sizes: Sizes,
    limits: Int[Array, " K"] | None = None,
) -> tuple[KeptPairs, Array, Bool[Array, "B K C"], tuple[Array, Array, Array]]:
    """At a border: E and the attention received, faded; which of the leaving tokens have a place; who lost it.

    Rows that are not at a border keep what they have; then the leaving tokens that have a place are those in E.
    """
    k, v, start = keys
    window, block, count = sizes.window, sizes.block, pairs.index.shape[2]
    document = start[:, window]  # of the block's first query
    place = begin[:, None] - window + jnp.arange(block, dtype=jnp.int32)
    leaves = (start[:, :block] == document[:, None]) & (start[:, :block] >= 0)
    leaves &= place - start[:, :block] >= sizes.prefix

    def leaving(x: Array) -> Array:
        return jnp.moveaxis(x[:, :block], 1, 2)  # [B, K, C, H]

    alive = (pairs.index >= 0) & (pairs.index >= document[:, None, None])
    scores = jnp.concatenate(
        [
            jnp.where(alive, FADE * pairs.score, -1.0),
            jnp.where(leaves[:, None], FADE * near[:, :, :block], -1.0),
        ],
        axis=2,
    )  # fmt: skip
    score, winner = jax.lax.top_k(jax.lax.stop_gradient(scores), count)
    if limits is not None:
        score = jnp.where(jnp.arange(count, dtype=jnp.int32) < limits[:, None], score, -1.0)

    def picked(old: Array, new: Array) -> Array:
        both = jnp.concatenate([old, new.astype(old.dtype)], axis=2)
        return jnp.take_along_axis(both, winner.reshape(*winner.shape, *(1,) * (both.ndim - 3)), axis=2)

    places = jnp.broadcast_to(place[:, None], (*pairs.index.shape[:2], block))
    index = jnp.where(score >= 0, picked(pairs.index, places), -1)
    score = jnp.maximum(score, 0.0)
    chosen = KeptPairs(picked(pairs.k, leaving(k)), picked(pairs.v, leaving(v)), index, score, pairs.near)
    chosen = _where(border, chosen, pairs)
    stays = (places[..., None] == chosen.index[:, :, None]).any(axis=-1)
    # Of the living old pairs, those that are no longer there: at most as many as could come in.
    gone = border[:, None, None] & alive & ~(pairs.index[..., None] == chosen.index[:, :, None]).any(axis=-1)
    order = jnp.argsort(~gone, axis=2, stable=True)[:, :, : min(block, count)]
    there, index = (jnp.take_along_axis(x, order, axis=2) for x in (gone, pairs.index))
    lost_k, lost_v = (jnp.take_along_axis(x, order[..., None], axis=2) for x in (pairs.k, pairs.v))
    faded = jnp.where(border[:, None, None], FADE * near, near)
    return chosen, faded, stays, (lost_k, lost_v, jnp.where(there, index, -1))


def _attend(
    own: tuple[Array, Array, Array],
    keys: tuple[Array, Array, Array],
    pairs: KeptPairs,
    begin: Int[Array, " B"],
    frequencies: Float[Array, " H/2"] | None,
    sizes: Sizes,
) -> tuple[Array, Array, Float[Array, "B K WC"], Float[Array, "B K X"]]:
    """One block's softmax over window and pairs, its log-normalizer, and the attention that each key received of the
    whole exact part."""
    (q, asks, other), (k, v, start) = own, keys
    window, block = sizes.window, q.shape[1]
    (batch, _, heads, width), groups = q.shape, k.shape[2]
    wide = accumulation_dtype(q)
    precision = jax.lax.Precision.DEFAULT if q.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST
    far = pairs.k
    if frequencies is not None:
        # Places inside the block, so that angles are as exact late in a text as early.
        near_place = jnp.arange(window + block, dtype=jnp.int32) - window
        q = rotate(q, *cos_sin(frequencies, near_place[window:]))
        k = rotate(k, *cos_sin(frequencies, near_place))
        # Distances are cut at the block's border, in whichever pieces the block is read.
        late = (begin % sizes.block)[:, None, None]
        far_place = jnp.maximum(pairs.index - begin[:, None, None] + late, sizes.block - sizes.reach) - late
        far = jnp.moveaxis(far, 1, 2)  # [B, X, K, H], each key head with angles of its own
        cos, sin = cos_sin(frequencies, jnp.moveaxis(far_place, 1, 2))
        far = jnp.moveaxis(turn(far, cos, sin), 2, 1)
    grouped = jnp.moveaxis(q.reshape(batch, block, groups, heads // groups, width), 1, 3)  # [B, K, G, C, H]
    near_scores = jnp.einsum("bkgch,bjkh->bkgcj", grouped, k, precision=precision, preferred_element_type=wide)
    far_scores = jnp.einsum("bkgch,bkxh->bkgcx", grouped, far, precision=precision, preferred_element_type=wide)

    row, column = jnp.arange(block)[:, None], jnp.arange(window + block)
    document = jnp.where(asks, start[:, window:], -2)
    seen = (column > row) & (column <= row + window) & (start[:, None] == document[..., None])  # [B, C, WC]
    place = begin[:, None] + jnp.arange(block, dtype=jnp.int32)
    index = pairs.index[:, :, None]
    seen_far = (index >= 0) & (index <= place[:, None, :, None] - window)
    seen_far &= index >= document[:, None, :, None]
    seen_far &= asks[:, None, :, None]
    scores = jnp.concatenate([near_scores, far_scores], axis=-1) * jnp.asarray(width**-0.5, wide)
    visible = jnp.concatenate(
        [jnp.broadcast_to(seen[:, None], (batch, groups, block, window + block)), seen_far], axis=-1
    )
    visible = visible[:, :, None]  # [B, K, 1, C, WC + X]
    top = jax.lax.stop_gradient(jnp.max(jnp.where(visible, scores, EMPTY), axis=-1))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - top[..., None], 0.0)), 0.0)
    total = weights.sum(axis=-1)
    there = total > 0
    n = jnp.where(there, jnp.log(jnp.where(there, total, 1.0)) + top, EMPTY)  # [B, K, G, C]
    values = jnp.concatenate([jnp.moveaxis(v, 2, 1), pairs.v.astype(v.dtype)], axis=2)
    y = jnp.einsum(
        "bkgcj,bkjh->bkgch", weights.astype(v.dtype), values, precision=precision, preferred_element_type=wide
    )
    y = y / jnp.where(there, total, 1.0)[..., None]
    beside = jnp.moveaxis(other.reshape(batch, block, groups, heads // groups), 1, 3).astype(wide)
    part = jnp.where(there, jax.nn.sigmoid(n - beside) / jnp.where(there, total, 1.0), 0.0)
    received = jax.lax.stop_gradient((weights * part[..., None]).sum(axis=(2, 3)))  # [B, K, WC + X]
    # A pair that is still in the window receives there.
    at = pairs.index - (begin[:, None, None] - window)
    inside = (pairs.index >= 0) & (at >= 0)
    also = jnp.take_along_axis(received[:, :, : window + block], jnp.clip(at, 0, window + block - 1), axis=2)
    received_pairs = received[:, :, window + block :] + jnp.where(inside, also, 0.0)

    def back(x: Array) -> Array:
        return jnp.moveaxis(x, 3, 1).reshape(batch, block, heads, *x.shape[4:])

    return back(y), back(n), received[:, :, : window + block], received_pairs


def turn(x: Float[Array, "... H"], cos: Float[Array, "... H/2"], sin: Float[Array, "... H/2"]) -> Array:
    """``rotate`` by angles of every head's own."""
    wide = accumulation_dtype(x)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    cos, sin = cos.astype(wide), sin.astype(wide)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
