"""The two halves of generation as jitted functions over a state of fixed size.

The state is donated: a call overwrites it in place, so memory does not grow with what has been read or written.
"""

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lizard_jax.errors import UserError
from lizard_jax.generate.sampling import Sampling, draw
from lizard_jax.models.llama import Llama
from lizard_jax.nn import reuse
from lizard_jax.nn.cache import KVCache
from lizard_jax.nn.finite import not_finite
from lizard_jax.typing import Array, Bool, Float, Int
from pallas_kernels import partition

PREFILL = 512
"""Tokens of a prompt read at once."""
NOT_FINITE = -2
"""Stands for a token where there were no logits to draw it from."""
BLOCK = 32
"""Most tokens written between two looks at the host."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """Where every row stands.

    Attributes:
        state: the model's, after every token but ``token``.
        token: ``[B]`` the last one drawn, not yet read.
        written: ``[B]`` how many were drawn.
        rows: ``[B]`` the number of each row's prompt, which its draws depend on.
        alive: ``[B]`` rows that go on.
        seen: ``[B, V]`` tokens of prompt and continuation, where the repetition penalty asks for them.
    """

    state: Any
    token: Int[Array, " B"]
    written: Int[Array, " B"]
    rows: Int[Array, " B"]
    alive: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None


@functools.partial(jax.jit, donate_argnums=(2, 3))
@reuse.scope()
def _read(
    model: Llama, tokens: Int[Array, "B T"], state: Any, hidden: Float[Array, "B D"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], Any]:
    """Reads a chunk; the hidden state of each row's last real token, or the one before where the chunk has none."""
    all_hidden, state = model.extend_hidden(tokens, state, lengths)
    last = jnp.take_along_axis(all_hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((lengths > 0)[:, None], last, hidden), state


@jax.jit
def _logits(model: Llama, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    return model.logits(hidden[:, None])[:, 0]


def chunks(lengths: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Start and width of the chunks that cover rows of these lengths.

    Whole chunks of ``size``, then one as wide as a power of two (at least 16), so that few widths are ever compiled.
    """
    longest, start = max(lengths), 0
    while longest - start >= size:
        yield start, size
        start += size
    if longest > start:
        yield start, min(size, max(16, 1 << (longest - start - 1).bit_length()))


def blocks(
    rows: Sequence[Sequence[int]], spans: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, Int[Array, "B T"], Int[Array, " B"]]]:
    """Rows of unequal length, span by span (start and width): its start, the tokens there, 0 where a row has none, and
    how many of each row are real."""
    lengths = np.asarray([len(row) for row in rows])
    for start, width in spans:
        count = np.clip(lengths - start, 0, width).astype(np.int32)
        tokens = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : count[i]] = row[start : start + count[i]]
        yield start, jnp.asarray(tokens), jnp.asarray(count)


def prefill(
    model: Llama, prompts: Sequence[Sequence[int]], state: Any, *, size: int = PREFILL
) -> tuple[Float[Array, "B V"], Any]:
    """Reads prompts of any lengths ≥ 1 into a state (donated): the logits after each one's last token, and the state.

    Memory is that of one chunk of ``size`` tokens whatever the prompts' length.
    """
    hidden = jnp.zeros((len(prompts), model.config.hidden_size), model.embed.embedding.dtype)
    for _, tokens, lengths in blocks(prompts, chunks([len(prompt) for prompt in prompts], size)):
        hidden, state = _read(model, tokens, state, hidden, lengths)
    return _logits(model, hidden), state


def capacity(lengths: Sequence[int], new: int, size: int = PREFILL) -> int:
    """What a key/value cache must hold for these prompts and ``new`` tokens: a multiple of the chunk."""
    return -(-(max(lengths) + new) // size) * size


def check_room(model: Llama, rows: int, length: int) -> None:
    """Refuses what cannot be held before anything is allocated.

    Raises:
        UserError: the states of so many rows of ``length`` tokens take more than the device's memory.
    """
    stats = jax.devices()[0].memory_stats() or {}
    there = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = partition.row_parts(rows) * partition.head_parts(model.config.kv_heads)
    needed = rows * model.state_bytes(length) // parts
    if needed > there:
        raise UserError(
            f"the state of {rows:,} rows of {length:,} tokens takes {needed / 1e9:,.1f} GB of a device, and there are "
            f"{there / 1e9:,.1f} GB; give fewer prompts at once, or a smaller --max-new-tokens"
        )


def with_room(state: Any, lengths: Sequence[int], new: int, size: int = PREFILL) -> Any:
    """A state whose key/value caches, if it has any, hold so much more; one without them is large enough as it is."""

    def grow(part: Any) -> Any:
        if not isinstance(part, KVCache):
            return part
        return part.with_room(capacity([int(part.position.max()) + max(lengths)], new, size))

    return jax.tree.map(grow, state, is_leaf=lambda part: isinstance(part, KVCache))


@functools.partial(jax.jit, static_argnames=("sampling", "stops"), donate_argnums=(1,))
def _first(logits: Float[Array, "B V"], carry: Carry, *, sampling: Sampling, stops: tuple[int, ...]) -> Carry:
    token = _finite(logits, draw(logits, carry.seen, carry.rows, carry.written, sampling))
    return _drawn(carry, token, stops)


def _finite(logits: Float[Array, "B V"], token: Int[Array, " B"]) -> Int[Array, " B"]:
    """The tokens drawn, NOT_FINITE where the logits they were drawn from are none."""
    return jnp.where(jnp.isfinite(logits.max(axis=-1)), token, NOT_FINITE)


def _drawn(carry: Carry, token: Int[Array, " B"], stops: tuple[int, ...]) -> Carry:
    alive = carry.alive
    for stop in (*stops, NOT_FINITE):
        alive = alive & (token != stop)
    seen = carry.seen
    if seen is not None:
        seen = seen | jax.nn.one_hot(token, seen.shape[-1], dtype=jnp.bool_)
    return replace(carry, token=token, written=carry.written + carry.alive.astype(jnp.int32), alive=alive, seen=seen)


@functools.partial(jax.jit, static_argnames=("sampling", "stops"), donate_argnums=(1,))
@reuse.scope()
def _write(
    model: Llama, carry: Carry, count: Int[Array, ""], *, sampling: Sampling, stops: tuple[int, ...]
) -> tuple[Int[Array, "BLOCK B"], Carry]:
    """Up to ``count`` ≤ BLOCK more tokens of every row that is alive; -1 marks those that are not."""
    buffer = jnp.full((BLOCK, carry.token.shape[0]), -1, jnp.int32)

    def body(loop):
        i, buffer, carry = loop
        lengths = carry.alive.astype(jnp.int32)
        logits, state = model.extend(carry.token[:, None], carry.state, lengths)
        token = _finite(logits[:, 0], draw(logits[:, 0], carry.seen, carry.rows, carry.written, sampling))
        token = jnp.where(carry.alive, token, carry.token)
        buffer = buffer.at[i].set(jnp.where(carry.alive, token, -1))
        return i + 1, buffer, _drawn(replace(carry, state=state), token, stops)

    def more(loop):
        i, _, carry = loop
        return (i < count) & jnp.any(carry.alive)

    _, buffer, carry = jax.lax.while_loop(more, body, (jnp.int32(0), buffer, carry))
    return buffer, carry


def start(
    logits: Float[Array, "B V"],
    state: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stops: tuple[int, ...] = (),
    rows: Sequence[int] | None = None,
    written: int = 0,
) -> Carry:
    """The carry after the first draw from the logits that ``prefill`` gave.

    Args:
        stops: token ids that end a row; the token itself is still drawn.
        rows: the prompts' numbers, if not 0, 1, ….
        written: how many tokens were drawn before, in a conversation that goes on.
    """
    batch, vocabulary = logits.shape
    seen = None
    if sampling.remembers:
        table = np.zeros((batch, vocabulary), np.bool_)
        for row, prompt in enumerate(prompts):
            table[row, np.asarray(prompt, np.int64)] = True
        seen = jnp.asarray(table)
    number = np.arange(batch, dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    carry = Carry(
        state, jnp.zeros((batch,), jnp.int32), jnp.full((batch,), written, jnp.int32), jnp.asarray(number),
        jnp.ones((batch,), jnp.bool_), seen,
    )  # fmt: skip
    return _first(logits, carry, sampling=sampling, stops=stops)


def write(
    model: Llama, carry: Carry, count: int, sampling: Sampling, *, stops: tuple[int, ...] = ()
) -> tuple[Int[np.ndarray, "n B"], Carry]:
    """Up to ``count`` ≤ BLOCK more tokens of every living row (-1 elsewhere), and the carry after them (donated)."""
    buffer, carry = _write(model, carry, jnp.int32(count), sampling=sampling, stops=stops)
    tokens = np.asarray(buffer)[:count]
    return tokens[(tokens != -1).any(axis=1)], carry


def check_finite(model: Llama, tokens: Int[np.ndarray, "n B"]) -> None:
    """Refuses to go on where a token was drawn from logits that are not finite.

    Raises:
        UserError: one was; it names the first parameter that is not finite, if one is.
    """
    if (tokens == NOT_FINITE).any():
        raise broken(model)


def broken(model: Llama) -> UserError:
    """What to say of a model whose logits are not finite."""
    if (path := not_finite(model)) is not None:
        return UserError(f"the model's logits are not finite: its parameter {path} holds NaN or infinity")
    return UserError(
        "the model's logits are not finite, though its parameters are: values overflow on the way; try --dtype float32"
    )
