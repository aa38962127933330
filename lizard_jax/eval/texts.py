"""Documents to be scored: their token ids, and the bytes of text that each token stands for."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lizard_jax.config import DataConfig
from lizard_jax.errors import UserError

AT_ONCE = 64
"""Documents tokenized together."""


@dataclass(frozen=True)
class Tokens:
    """One document as the model is to read it, with what the tokenizer puts around a text.

    Attributes:
        ids: ``[n]`` int32.
        sizes: ``[n]`` UTF-8 bytes of the document that end with each token; what the tokenizer adds has none, and
            text that no token stands for counts with the token behind it.
        text: the document.
    """

    ids: Int[np.ndarray, " n"]
    sizes: Int[np.ndarray, " n"]
    text: str


def check_data(path: str) -> None:
    """Refuses at once what cannot be data, before a model is loaded for it.

    Raises:
        UserError: a file that is missing or empty.
    """
    file = Path(path).expanduser()
    if file.is_file() and not file.stat().st_size:
        raise UserError(f"{path} is empty")
    if not file.exists() and (file.suffix or file.is_absolute() or path.startswith(".")):
        raise UserError(f"no data at {path}: there is no such file or directory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is read."""
    parser.add_argument("--data", required=True, metavar="PATH", help="text, or anything train.py takes as --data")
    parser.add_argument(
        "--held-out", action="store_true",
        help="of the data, only what train.py keeps for validation (data.held_out as it is by default)",
    )  # fmt: skip
    parser.add_argument("--separator", default="<|endoftext|>", help="what splits plain text (default %(default)s)")


def read(path: str, tokenizer: Any, *, vocab_size: int, separator: str, held_out: bool = False) -> Iterator[Tokens]:
    """The documents of ``path`` in their order, tokenized as they are needed; those with nothing to predict left out.

    With ``held_out`` only those that training with default settings keeps for validation, in its order.

    ``path`` is whatever train.py takes for data: plain text split at ``separator``, Alpaca or chat records, a
    ``datasets`` name; and ``embedded`` for the modules held out from the embedded teacher.

    Raises:
        UserError: no such data, nothing in it, or a token id outside the vocabulary.
    """
    from lizard_jax.data.loader import held_out_texts
    from lizard_jax.data.records import documents
    from lizard_jax.data.text import affixes
    from lizard_jax.embedded import corpus

    config = DataConfig(path=path, separator=separator)
    if held_out:
        texts: Iterable[str] = held_out_texts(config, tokenizer, vocab_size=vocab_size)
    elif path == "embedded":
        texts = corpus.documents("held_out")
    else:
        texts = (document.text for document in documents(config, tokenizer))
    head, tail = affixes(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    found = False
    for batch in batched(texts, AT_ONCE):
        encoded = backend.encode_batch(list(batch), add_special_tokens=False)
        for text, encoding in zip(batch, encoded, strict=True):
            before = head if encoding.ids[: len(head)] != head else []
            ids = np.asarray([*before, *encoding.ids, *tail], np.int32)
            if len(ids) < 2:
                continue
            if ids.max() >= vocab_size:
                raise UserError(
                    f"vocabulary mismatch: {path} holds token id {ids.max()}, but the model's vocabulary has "
                    f"{vocab_size} entries; use the model's own tokenizer"
                )
            found = True
            sizes = np.pad(bytes_of(text, [end for _, end in encoding.offsets]), (len(before), len(tail)))
            yield Tokens(ids, sizes, text)
    if not found:
        raise UserError(f"{path} holds no document of two tokens or more; there is nothing to predict in it")


def bytes_of(text: str, ends: list[int]) -> Int[np.ndarray, " n"]:
    """UTF-8 bytes between the characters at which one token after another ends; the last takes what is left."""
    if not ends:
        return np.zeros(0, np.int64)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    upto = np.concatenate([[0], np.cumsum(widths)])
    reached = np.maximum.accumulate(np.asarray(ends))
    reached[-1] = len(points)
    return np.diff(upto[reached], prepend=0)


def contexts(ids: Int[np.ndarray, " n"], length: int) -> Iterator[Int[np.ndarray, " m"]]:
    """A document in pieces of at most ``length`` predictions, each opened by the token that the last one ended with.

    Every token but the document's first is predicted once.
    """
    for start in range(0, len(ids) - 1, length):
        yield ids[start : start + length + 1]
