"""From documents to one flat array of tokens, and from that array to packed sequences.

How a document begins and ends is the tokenizer's business. It starts with what the tokenizer puts in front of a text
(BOS for Llama and Mistral, nothing for a tokenizer that adds none), once, even where the text spells it out. It ends
with what the tokenizer appends; an answer (Alpaca, chat) also ends with EOS, so that the model learns to stop, and
plain text does so only with ``eos=True``. The default was measured: at the end of a TinyStories story EOS costs the
babyllama teacher 13.3 nats and the next story's BOS 1.9, so EOS would teach the student what its teacher never saw.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tqdm import tqdm

from lizard_jax.errors import UserError

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Document:
    """One text. ``answers`` are the character spans ``[a, b)`` that count as answers; None where nothing is known.

    ``open_end`` says that EOS is still missing at the end, as it is after an Alpaca answer.
    """

    text: str
    answers: Spans | None = None
    open_end: bool = False


@dataclass(frozen=True)
class TokenizedText:
    """Documents as one flat array: document i is ``tokens[starts[i] : starts[i] + lengths[i]]``.

    ``scored`` marks the answers' tokens, EOS included; None where every token counts. ``origin`` is each document's
    place among those that were read, too short ones included.
    """

    tokens: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " docs"]
    lengths: Int[np.ndarray, " docs"]
    scored: Bool[np.ndarray, " n"] | None
    origin: Int[np.ndarray, " docs"]


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint, a directory or a hub id.

    ``tokenizer.json`` is taken as it stands. ``AutoTokenizer`` of transformers 5 builds Llama tokenizers anew instead,
    and so drops characters it has no token for: babyllama loses its line ends and 0.04 nats a token by it.

    Raises:
        UserError: no tokenizer there, or one that only exists as Python code.
    """
    from transformers import PreTrainedTokenizerFast

    local = Path(path).expanduser()
    if not local.is_dir() and (local.is_absolute() or local.exists()):
        raise UserError(f"no tokenizer at {path}: it is not a directory")
    name = str(local if local.is_dir() else path)
    if local.is_dir() and (local / "tokenizer.model").is_file() and not (local / "tokenizer.json").is_file():
        raise UserError(
            f"{path} has tokenizer.model but no tokenizer.json, which is what is read here; take tokenizer.json from "
            "the same model's repository, or convert it once where sentencepiece is installed: "
            "LlamaTokenizerFast.from_pretrained(DIR, from_slow=True).save_pretrained(DIR)"
        )
    try:
        if local.is_dir() and not (local / "tokenizer.json").is_file():
            # It brings torch along where that is installed: seconds, for what a rare checkpoint needs.
            from transformers import AutoTokenizer

            # A repository's own code is never run, whatever it answers for itself.
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    # transformers and tokenizers raise whatever the damaged file made them trip over.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"no tokenizer that transformers can load at {path}: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer at {path} has no fast form; save it as tokenizer.json with transformers first")
    return tokenizer


def check_unicode(text: str, what: str) -> None:
    """Refuses a text with half a surrogate pair, which no tokenizer takes; ``what`` names it.

    Raises:
        UserError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds {text[error.start]!a} at character {error.start}, half of a surrogate pair, which is "
            "no Unicode text"
        ) from None


def affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids ``tokenizer`` puts in front of a text, and those it appends."""
    for probe in _probes(tokenizer):
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if bare:
            break
    else:
        return [], []
    full = tokenizer(probe)["input_ids"]
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i], full[i + len(bare) :]
    return [], []


def _probes(tokenizer: Any) -> Iterator[str]:
    """Texts, one of which any tokenizer should have a token for."""
    yield "a"
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for token in islice((token for token in range(len(tokenizer)) if token not in special), 256):
        yield tokenizer.decode([token])


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    source: str,
    vocab_size: int,
    answer_only: bool = False,
    eos: bool = False,
) -> TokenizedText:
    """Tokenize ``documents`` into int32, a batch at a time; a bar on stderr shows when it takes long.

    Documents of fewer than two tokens are left out: they hold nothing to predict.

    Raises:
        UserError: no documents, only too short ones, a token id outside the vocabulary, or ``answer_only`` on documents
            that have no answers. ``source`` names the data in the message.
    """
    prefix, suffix = affixes(tokenizer)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch if answer_only else backend.encode_batch_fast
    tokens, lengths, origin, scored, seen = array("i"), array("q"), array("q"), bytearray(), 0
    with tqdm(desc="tokenizing", unit=" documents", delay=2.0, disable=None, leave=False) as bar:
        for batch in _batches(documents):
            for i, document in enumerate(batch):
                check_unicode(document.text, f"document {seen + i + 1} of {source}")
            encoded = encode([document.text for document in batch], add_special_tokens=False)
            for i, document in enumerate(batch):
                ids = encoded[i].ids
                head = prefix if ids[: len(prefix)] != prefix else []
                closes = document.open_end or (eos and document.answers is None)
                ended = [*ids[-1:], *suffix][-1:] == end
                tail = [*suffix, *end] if closes and not ended else suffix
                if len(head) + len(ids) + len(tail) < 2:
                    continue
                tokens.extend((*head, *ids, *tail))
                lengths.append(len(head) + len(ids) + len(tail))
                origin.append(seen + i)
                if answer_only:
                    if document.answers is None:
                        raise UserError(f"answer_only=true needs Alpaca or chat records, and {source} is plain text")
                    scored += bytes(len(head))
                    scored += _inside(encoded[i].offsets, document.answers).tobytes()
                    scored += bytes([document.open_end] * len(tail))
            seen += len(batch)
            bar.update(len(batch))
            bar.set_postfix(tokens=len(tokens), refresh=False)
    if not seen:
        raise UserError(f"{source} holds no documents")
    if not lengths:
        raise UserError(f"every document of {source} is shorter than two tokens")
    flat = np.frombuffer(tokens, np.int32)
    largest = int(flat.max())
    if largest >= vocab_size:
        raise UserError(
            f"vocabulary mismatch: {source} holds token id {largest} of the tokenizer {tokenizer.name_or_path or '?'}, "
            f"but the model's vocabulary has {vocab_size} entries; use the model's own tokenizer"
        )
    sizes = np.frombuffer(lengths, np.int64)
    return TokenizedText(
        tokens=flat,
        starts=np.cumsum(sizes) - sizes,
        lengths=sizes,
        scored=np.frombuffer(scored, np.bool_) if answer_only else None,
        origin=np.frombuffer(origin, np.int64),
    )


def _batches(documents: Iterable[Document], characters: int = 1 << 20, most: int = 1024) -> Iterator[list[Document]]:
    """Lists of documents of about ``characters`` together: enough to keep the tokenizer's threads busy."""
    documents = iter(documents)
    batch: list[Document] = []
    size = 0
    while chunk := list(islice(documents, 1)):
        batch += chunk
        size += len(chunk[0].text)
        if size >= characters or len(batch) >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _inside(offsets: list[tuple[int, int]], spans: Spans) -> Bool[np.ndarray, " n"]:
    """Which tokens end inside a span. A token that reaches over the start of an answer is the answer's."""
    ends = np.array([end for _, end in offsets], np.int64)
    inside = np.zeros(len(ends), np.bool_)
    for a, b in spans:
        inside |= (ends > a) & (ends <= b)
    return inside


@dataclass(frozen=True)
class Stream:
    """Documents of ``text`` end to end in the order ``order``, to be read at any position."""

    text: TokenizedText
    order: Int[np.ndarray, " docs"]
    ends: Int[np.ndarray, " docs"]

    @classmethod
    def of(cls, text: TokenizedText, order: Int[np.ndarray, " docs"]) -> "Stream":
        """The documents ``order`` of ``text``, in that order."""
        return cls(text, order, np.cumsum(text.lengths[order]))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(
        self, positions: Int[np.ndarray, "..."]
    ) -> tuple[Int[np.ndarray, "..."], Int[np.ndarray, "..."], Bool[np.ndarray, "..."]]:
        """Tokens, the documents they belong to (their place in ``order``), and whether they are scored."""
        document = np.searchsorted(self.ends, positions, side="right")
        chosen = self.order[document]
        source = self.text.starts[chosen] + positions - (self.ends[document] - self.text.lengths[chosen])
        scored = np.ones(positions.shape, np.bool_) if self.text.scored is None else self.text.scored[source]
        return self.text.tokens[source], document, scored
