"""Batches of packed sequences as a pure function of the seed and the step.

An epoch is the training documents in a new order, end to end, cut every T tokens. Sequence r reads the T+1 tokens from
``r*T`` on: inputs are the first T, targets the last T, so every token is a target exactly once (the very first aside,
and at most T at the end, which are dropped). The sequences of an epoch are then put in a second random order, because
neighbours may be pieces of one long document. Step s takes sequences ``s*B .. s*B + B-1``, running on into the next
epoch.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from lizard_jax.config import DataConfig
from lizard_jax.data.records import documents
from lizard_jax.data.text import Document, Stream, TokenizedText, tokenize
from lizard_jax.embedded import corpus
from lizard_jax.errors import UserError

_SPLIT_SEED = 20  # of the held-out choice: the same documents whatever the seed of a run


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """B packed sequences of T tokens.

    ``segment_ids`` counts the documents of a sequence from 1; 0 is padding. ``loss_mask`` is 1 where the target is
    scored: not where it is padding or, with ``segment_mask``, another document's first token, and with ``answer_only``
    not outside an answer.
    """

    inputs: Int[np.ndarray, "B T"]
    targets: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]
    loss_mask: Float[np.ndarray, "B T"]


class Loader:
    """The training batches and the held-out batches of one data set.

    Attributes:
        num_tokens: tokens of the training documents, which is what one epoch reads.
        num_documents: training documents.
        fingerprint: hash of the tokens and of every setting that shapes a batch; a resumed run must find it unchanged.

    Raises:
        UserError: the data cannot be read or tokenized, or they cannot fill one sequence or either part.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        *,
        vocab_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        _check(config, process_count)
        self.config = config
        if config.path == "embedded":
            train = [Document(text) for text in corpus.documents("train")]
            source = [*train, *(Document(text) for text in corpus.documents("held_out"))]
        else:
            train = None
            source = documents(config, tokenizer)
        text = tokenize(
            source,
            tokenizer,
            source=config.path,
            vocab_size=vocab_size,
            answer_only=config.answer_only,
            eos=config.text_eos,
        )
        parts = _share(len(text.lengths), config) if train is None else _named(text.origin < len(train))
        self._text = text
        self._train, held = parts
        self._held = Stream.of(text, held)
        self._rows = config.batch_size // process_count
        self._first = process_index * self._rows
        self.num_documents = len(self._train)
        self.num_tokens = int(text.lengths[self._train].sum())
        self._sequences = (self.num_tokens - 1) // config.sequence_length
        if self._sequences < 1:
            raise UserError(
                f"{config.path} has {self.num_tokens} training tokens, fewer than one sequence of "
                f"{config.sequence_length} + 1; use more text or a smaller data.sequence_length"
            )
        self.fingerprint = _fingerprint(text, parts, config)
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, step: int) -> Batch:
        """The rows of step ``step`` (from 0) that belong to this process: ``[B / process_count, T]``."""
        rows = step * self.config.batch_size + self._first + np.arange(self._rows)
        epochs, places = np.divmod(rows, self._sequences)
        parts = []
        for epoch in np.unique(epochs):
            stream, order = self._epoch(int(epoch))
            parts.append(self._cut(stream, order[places[epochs == epoch]]))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def first(self, tokens: int) -> list[Batch]:
        """The first batches that hold so many tokens, at least one: what settings are measured on before training."""
        count = max(1, -(-tokens // (self.config.batch_size * self.config.sequence_length)))
        return [self.batch(step) for step in range(count)]

    def held_out(self) -> list[Batch]:
        """The validation batches, ``[B / process_count, T]`` each and the same at every call.

        At most ``held_out_tokens`` targets; what is missing to whole batches is padding.
        """
        size, length = self.config.batch_size, self.config.sequence_length
        targets = min(len(self._held) - 1, self.config.held_out_tokens)
        count = -(-targets // (size * length))
        firsts = [b * size + self._first for b in range(count)]
        return [self._cut(self._held, first + np.arange(self._rows), targets) for first in firsts]

    def training_documents(self) -> list[Int[np.ndarray, " n"]]:
        """The tokens of every training document, in the order they were read."""
        text = self._text
        return [text.tokens[text.starts[i] : text.starts[i] + text.lengths[i]] for i in self._train]

    def _shuffle(self, epoch: int) -> tuple[Stream, Int[np.ndarray, " sequences"]]:
        rng = np.random.default_rng([self.config.seed, epoch])
        stream = Stream.of(self._text, rng.permutation(self._train))
        return stream, rng.permutation(self._sequences)

    def _cut(self, stream: Stream, rows: Int[np.ndarray, " B"], targets: int | None = None) -> Batch:
        """The sequences ``rows`` of ``stream``, padded behind its first ``targets`` targets."""
        length = self.config.sequence_length
        positions = rows[:, None] * length + np.arange(length + 1)
        last = len(stream) - 1 if targets is None else targets
        tokens, document, scored = stream.read(np.minimum(positions, last))
        real = positions[:, 1:] <= last
        if self.config.segment_mask:
            segments = document[:, :-1] - document[:, :1] + 1
            scored = scored[:, 1:] & (document[:, 1:] == document[:, :-1])
        else:
            segments = np.ones_like(document[:, :-1])
            scored = scored[:, 1:]
        return Batch(
            inputs=np.where(real, tokens[:, :-1], 0).astype(np.int32),
            targets=np.where(real, tokens[:, 1:], 0).astype(np.int32),
            segment_ids=np.where(real, segments, 0).astype(np.int32),
            loss_mask=(real & scored).astype(np.float32),
        )


def held_out_texts(config: DataConfig, tokenizer: Any, *, vocab_size: int) -> list[str]:
    """The documents of ``config.path`` that a ``Loader`` of these settings keeps from training, in its order.

    Raises:
        UserError: as ``Loader``.
    """
    if config.path == "embedded":
        texts = list(corpus.documents("held_out"))
        count = len(list(corpus.documents("train")))
        order = _named(np.arange(count + len(texts)) < count)[1]
        return [texts[n - count] for n in order]
    _check(config, 1)
    text = tokenize(documents(config, tokenizer), tokenizer, source=config.path, vocab_size=vocab_size)
    chosen = text.origin[_share(len(text.lengths), config)[1]].tolist()
    wanted = set(chosen)
    found = {n: document.text for n, document in enumerate(documents(config, tokenizer)) if n in wanted}
    return [found[n] for n in chosen]


def _check(config: DataConfig, process_count: int) -> None:
    for name in ("sequence_length", "batch_size", "held_out_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"data.{name}={getattr(config, name)} must be at least 1")
    if not 0 < config.held_out < 1:
        raise UserError(f"data.held_out={config.held_out} must lie between 0 and 1")
    if config.seed < 0:
        raise UserError(f"data.seed={config.seed} must not be negative")
    if config.batch_size % process_count:
        raise UserError(f"data.batch_size={config.batch_size} does not divide among {process_count} processes")


def _share(count: int, config: DataConfig) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " held"]]:
    """A random share of ``count`` documents held out, at least one; it does not depend on the run's seed."""
    held = max(1, round(config.held_out * count))
    if held >= count:
        raise UserError(
            f"{config.path} has {count} document{'s' * (count > 1)}, and data.held_out={config.held_out} leaves none "
            f"to train on; use more documents, a smaller share, or the data.separator that splits this text"
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(count)
    return np.sort(order[held:]), order[:held]


def _named(is_train: Bool[np.ndarray, " docs"]) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " held"]]:
    """The embedded text's own split, the held-out modules in a fixed random order."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(np.flatnonzero(~is_train))
    return np.flatnonzero(is_train), order


def _fingerprint(text: TokenizedText, parts: tuple[np.ndarray, np.ndarray], config: DataConfig) -> str:
    shape = (config.sequence_length, config.batch_size, config.held_out_tokens, config.segment_mask, config.seed)
    digest = hashlib.sha256(repr(shape).encode())
    for values in (text.tokens, text.lengths, text.scored, *parts):
        if values is not None:
            digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()[:32]
