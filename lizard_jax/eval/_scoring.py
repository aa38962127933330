"""How likely continuations are after their contexts, with everything they share read once.

A few-shot task asks about thousands of texts that begin alike. Three stages read them: the head that many contexts
share (the examples), once; each context's rest from the head's state, in batches; each continuation from its context's
state, in batches. A continuation of one token costs nothing beyond its context. The result is that of reading every
text whole, and a linearized model's states are small enough to be copied freely.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lizard_jax.errors import UserError
from lizard_jax.generate.decode import PREFILL, blocks, capacity, chunks
from lizard_jax.models.llama import Llama
from lizard_jax.nn import reuse
from lizard_jax.typing import Array, Bool, Float, Int

Tokens = tuple[int, ...]
SHARED = 32
"""Fewest tokens of a head that is worth a reading of its own."""
POSITIONS = 32
"""Positions whose logits over the whole vocabulary exist at once."""


def _scores(
    model: Llama, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Log-probability of each target after its position, and whether it is the likeliest token there."""

    def block(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, wanted = model.logits(part[0]), part[1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), wanted[..., None], axis=-1)[..., 0]
        return chosen, jnp.argmax(logits, axis=-1).astype(jnp.int32) == wanted

    if hidden.shape[1] <= POSITIONS:
        return block((hidden, targets))
    # The widths of ``chunks`` are multiples of POSITIONS from there on.
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, POSITIONS, *x.shape[2:]), 1, 0), (hidden, targets)
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(hidden.shape[0], -1), jax.lax.map(block, parts))


@functools.partial(jax.jit, donate_argnums=(2, 3))
@reuse.scope()
def _read(
    model: Llama, tokens: Int[Array, "B T"], state: Any, last: Float[Array, "B D"], lengths: Int[Array, " B"]
) -> tuple[Float[Array, "B D"], Any]:
    """The hidden state of each row's last token so far, and the states after these."""
    hidden, state = model.extend_hidden(tokens, state, lengths)
    end = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where((lengths > 0)[:, None], end, last), state


@functools.partial(jax.jit, donate_argnums=(2,))
@reuse.scope()
def _read_scored(
    model: Llama, tokens: Int[Array, "B T"], state: Any, lengths: Int[Array, " B"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, " B"], Bool[Array, " B"], Any]:
    """Each row's summed log-probability of what follows its tokens, whether all of it is likeliest, and the states."""
    hidden, state = model.extend_hidden(tokens, state, lengths)
    scores, greedy = _scores(model, hidden, targets)
    real = jnp.arange(tokens.shape[1], dtype=jnp.int32) < lengths[:, None]
    return jnp.sum(jnp.where(real, scores, jnp.zeros_like(scores)), axis=1), jnp.all(greedy | ~real, axis=1), state


@jax.jit
def _first(
    model: Llama, last: Float[Array, "B D"], index: Int[Array, " R"], targets: Int[Array, " R"]
) -> tuple[Float[Array, " R"], Bool[Array, " R"]]:
    scores, greedy = _scores(model, last[index][:, None], targets[:, None])
    return scores[:, 0], greedy[:, 0]


@jax.jit
def _rows(tree: Any, index: Int[Array, " R"]) -> Any:
    """These rows of a batch of states, copied."""
    return jax.tree.map(lambda x: x[index], tree)


def _blocks(rows: Sequence[Tokens]) -> Iterator[tuple[int, Int[Array, "B T"], Int[Array, " B"]]]:
    return blocks(rows, chunks([len(row) for row in rows], PREFILL))


def _shared(a: Tokens, b: Tokens) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def families(contexts: Sequence[Tokens]) -> list[tuple[int, list[Tokens]]]:
    """Contexts by the head they share: ``(head's length, its contexts)``; those that share none come last, with 0.

    Neighbours in sorted order belong together where at least half of the shorter one, and ``SHARED`` tokens, are the
    same. Every context keeps at least one token of its own.
    """
    runs: list[list[Tokens]] = []
    for context in sorted(set(contexts)):
        before = runs[-1][-1] if runs else ()
        if _shared(before, context) >= max(SHARED, min(len(before), len(context)) // 2):
            runs[-1].append(context)
        else:
            runs.append([context])
    found, alone = [], []
    for run in runs:
        head = min(_shared(run[0], run[-1]), min(map(len, run)) - 1)
        if len(run) > 1 and head >= SHARED:
            found.append((head, run))
        else:
            alone += run
    return [*found, *([(0, alone)] if alone else [])]


def _room(longest: int) -> int:
    """What a key/value cache holds: attention pays for all of it, and every size is compiled for."""
    return max(128, 1 << (longest - 1).bit_length()) if longest < PREFILL else capacity([longest], 0)


class Scorer:
    """Scores continuations with one model.

    Args:
        batch: texts read at once.
        max_length: tokens a text may have, without its last, which is only predicted. A longer one loses its beginning.
    """

    def __init__(self, model: Llama, *, batch: int, max_length: int) -> None:
        self.model, self.batch, self.max_length = model, batch, max_length
        self.tokens_read = 0

    def score(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, advance: Callable[[int], Any] = lambda n: None
    ) -> list[tuple[float, bool]]:
        """For each ``(context, continuation)`` its log-probability, and whether greedy decoding would have written it.

        Args:
            advance: told how many requests were answered since the last call.

        Raises:
            UserError: an empty context or continuation, or a continuation that does not fit.
        """
        wanted: dict[Tokens, dict[Tokens, list[int]]] = {}
        for number, (context, continuation) in enumerate(requests):
            count = len(continuation)
            if not context or not count:
                raise UserError(
                    f"request {number + 1} has no {'continuation' if context else 'context'}; each needs one token"
                )
            if count > self.max_length:
                raise UserError(
                    f"request {number + 1} asks for {count} tokens at once, and the model reads {self.max_length}; "
                    "raise --max-length if it can read more"
                )
            text = (*context, *continuation)[-(self.max_length + 1) :]
            wanted.setdefault(text[:-count], {}).setdefault(text[-count:], []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def length(context: Tokens) -> int:
            return len(context) + max(map(len, wanted[context])) - 1

        for head, members in families(list(wanted)):
            members = sorted(members, key=length, reverse=True)
            shared = None
            if head:
                room = _room(length(members[0]))
                _, shared = self._read([members[0][:head]], self.model.init_state(1, room))
            for at in range(0, len(members), self.batch):
                part = members[at : at + self.batch]
                if shared is None:
                    state = self.model.init_state(self.batch, _room(length(part[0])))
                else:
                    state = _rows(shared, jnp.zeros((self.batch,), jnp.int32))
                rest = [context[head:] for context in part]
                last, state = self._read([*rest, *[()] * (self.batch - len(part))], state)
                asked = [(row, tokens) for row, context in enumerate(part) for tokens in wanted[context]]
                found = self._continue(last, state, asked)
                for (row, tokens), answer in zip(asked, found, strict=True):
                    for number in wanted[part[row]][tokens]:
                        answers[number] = answer
                advance(sum(len(wanted[part[row]][tokens]) for row, tokens in asked))
        return answers

    def _read(self, rows: Sequence[Tokens], state: Any) -> tuple[Float[Array, "B D"], Any]:
        last = jnp.zeros((len(rows), self.model.config.hidden_size), self.model.embed.embedding.dtype)
        for _, tokens, lengths in _blocks(rows):
            last, state = _read(self.model, tokens, state, last, lengths)
        self.tokens_read += sum(map(len, rows))
        return last, state

    def _continue(
        self, last: Float[Array, "B D"], state: Any, asked: Sequence[tuple[int, Tokens]]
    ) -> list[tuple[float, bool]]:
        """Scores of ``(row, continuation)`` after the states' rows."""
        sums, greedy = np.zeros(len(asked)), np.ones(len(asked), np.bool_)
        order = sorted(range(len(asked)), key=lambda i: len(asked[i][1]), reverse=True)
        for at in range(0, len(order), self.batch):
            chosen = order[at : at + self.batch]
            padding = self.batch - len(chosen)
            index = jnp.asarray([*(asked[i][0] for i in chosen), *[0] * padding], jnp.int32)
            texts = [*(asked[i][1] for i in chosen), *[(0,)] * padding]
            score, right = _first(self.model, last, index, jnp.asarray([text[0] for text in texts], jnp.int32))
            parts = [(score, right)]
            if len(texts[0]) > 1:
                branch = _rows(state, index)
                read, following = [text[:-1] for text in texts], [text[1:] for text in texts]
                for (_, tokens, lengths), (_, targets, _) in zip(_blocks(read), _blocks(following), strict=True):
                    score, right, branch = _read_scored(self.model, tokens, branch, lengths, targets)
                    parts.append((score, right))
                self.tokens_read += sum(map(len, read))
            for score, right in parts:
                sums[chosen] += np.asarray(score, np.float64)[: len(chosen)]
                greedy[chosen] &= np.asarray(right)[: len(chosen)]
        return [(float(a), bool(b)) for a, b in zip(sums, greedy, strict=True)]
