"""Needles in filler, our own prose or any text, cut so that the whole document has an exact number of tokens.

The text decides: tokens are those of the finished text, counted as ``data.text.tokenize`` counts them, so a model meets
the same tokens whether it is trained on the text or asked with it.
"""

import bisect
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lizard_jax.data.records import alpaca_document
from lizard_jax.data.template import rendered
from lizard_jax.data.text import Document, affixes
from lizard_jax.errors import UserError

Form = Literal["alpaca", "chat", "plain"]
FORMS: tuple[Form, ...] = ("alpaca", "chat", "plain")
"""How a question is put: as an Alpaca record, through the tokenizer's chat template with the first words of the answer
given, or as a text that breaks off where the answer stands."""

ALPHABETS = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")

# No digits and no names: nothing in it can be taken for a needle.
SENTENCES = (
    "The river turns slowly below the old mill.",
    "A cart rolls by with hay and apples.",
    "In the garden the beans climb up their poles.",
    "Nobody hurries when the road is dry and warm.",
    "Smoke rises from a chimney behind the church.",
    "The baker sweeps the flour from his steps.",
    "Two dogs sleep in the shade of a wall.",
    "Rain is expected, but the sky stays clear.",
    "The bell rings at noon and again in the evening.",
    "Children carry water from the well to the barn.",
    "A kite hangs over the field and does not fall.",
    "The letters on the sign have faded in the sun.",
    "Bread, cheese and pears are on the table.",
    "The path goes uphill between stones and grass.",
    "Someone has left a ladder under the cherry tree.",
    "Geese cross the meadow in a long line.",
    "At the bridge the miller talks about the weather.",
    "The windows stand open all through the summer.",
    "A boat is tied to the willow near the bank.",
    "The hills beyond the village turn blue at dusk.",
)


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, at a share ``depth`` of the filler, 0 (its start) to 1 (its end)."""

    text: str
    depth: float


@dataclass(frozen=True)
class Question:
    """What is asked about a haystack.

    Attributes:
        task: what the text is introduced with, in the Alpaca form.
        asked: the question, in the Alpaca form.
        opening: the beginning of the sentence that the answer ends, in the plain form and in the chat's.
        answer: what is to be written.
    """

    task: str
    asked: str
    opening: str
    answer: str

    def record(self, haystack: str) -> dict[str, str]:
        """The Alpaca record. The question stands behind the text, so that the reader cannot look for its answer."""
        return {"instruction": f"{self.task}\n\n{haystack}\n\n{self.asked}", "input": "", "output": self.answer}

    def document(self, haystack: str, form: Form, tokenizer: Any) -> Document:
        """Text and question and answer, the answer marked; ``tokenizer`` is asked for the chat's template alone.

        Raises:
            UserError: a chat is asked for of a tokenizer without a template.
        """
        if form == "alpaca":
            return alpaca_document(self.record(haystack), "a generated record")
        start = haystack + "\n"
        if form == "chat":
            if not tokenizer.chat_template:
                raise UserError(
                    f"the tokenizer {tokenizer.name_or_path or '?'} has no chat template; give another --form"
                )
            asked = [{"role": "user", "content": self.record(haystack)["instruction"]}]
            start = rendered(tokenizer, asked, tokenize=False, add_generation_prompt=True)
        prompt = start + self.opening
        text = f"{prompt} {self.answer}"
        return Document(text, answers=((len(prompt), len(text)),), open_end=form == "chat")


def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text that can be filler, in order: of 20 to 300 characters, without digits.

    Raises:
        UserError: it has fewer than ten.
    """
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text))
    found = tuple(part for part in parts if 20 <= len(part) <= 300 and not re.search(r"\d", part))
    if len(found) < 10:
        raise UserError(
            f"the filler has {len(found)} sentences of 20 to 300 characters without digits; give a longer one"
        )
    return found


def filler(file: str | Path | None) -> tuple[str, ...] | None:
    """The sentences of a text file; None, for prose of our own, where there is none.

    Raises:
        UserError: it cannot be read, or has too few.
    """
    if file is None:
        return None
    try:
        return sentences(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the filler {file}: {getattr(error, 'strerror', None) or error}") from None


class Measure:
    """Counts tokens as training does.

    Args:
        filler: sentences that haystacks are made of, in this order from a random one on; by default our own, shuffled.
    """

    def __init__(self, tokenizer: Any, filler: Sequence[str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.filler = filler
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._head, self._tail = affixes(tokenizer)
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def ids(self, text: str) -> list[int]:
        """The text's own tokens, nothing put in front or appended."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str) -> list[int]:
        """The tokens to go on from: behind what the tokenizer puts in front of a text."""
        ids = self.ids(text)
        return [*(self._head if ids[: len(self._head)] != self._head else []), *ids]

    def covering(self, text: str, start: int, stop: int) -> list[int]:
        """Places among ``prompt(text)`` of the tokens that hold a character of ``text[start:stop]``."""
        found = self._backend.encode(text, add_special_tokens=False)
        before = len(self.prompt(text)) - len(found.ids)
        return [before + i for i, (a, b) in enumerate(found.offsets) if a < stop and b > start]

    def length(self, document: Document) -> int:
        """Tokens of the document with all that goes around it, EOS included where its answer ends with one."""
        ends = document.open_end and self._tail[-1:] != self._end
        return len(self.prompt(document.text)) + len(self._tail) + len(self._end) * ends

    @functools.cached_property
    def characters(self) -> float:
        """Characters of filler in a token."""
        text = " ".join(self.filler or SENTENCES)[:20_000]
        return len(text) / len(self.ids(text))

    @functools.cached_property
    def alphabet(self) -> str:
        """Characters for random strings that this tokenizer knows: digits if it can.

        Raises:
            UserError: it knows neither digits nor letters.
        """
        for alphabet in ALPHABETS:
            if self.tokenizer.decode(self.ids(alphabet), clean_up_tokenization_spaces=False).strip() == alphabet:
                return alphabet
        raise UserError(f"the tokenizer {self.tokenizer.name_or_path or '?'} knows neither all digits nor all letters")

    def random_string(self, rng: np.random.Generator, tokens: int, before: str) -> str:
        """A random string of exactly ``tokens`` tokens where it stands, behind the text ``before``.

        Raises:
            UserError: this tokenizer makes none.
        """
        start = len(self.ids(before))
        for _ in range(32):
            text = "".join(rng.choice(list(self.alphabet), 16 * tokens))
            fitting = []
            for size in range(1, len(text) + 1):
                count = len(self.ids(before + text[:size])) - start
                if count == tokens:
                    fitting.append(size)
                # A longer string may take a token less where its end merges.
                elif count > tokens + 1:
                    break
            if fitting:
                return text[: int(rng.choice(fitting))]
        name = self.tokenizer.name_or_path or "?"
        raise UserError(f"no random string of {tokens} tokens was found with the tokenizer {name}; take another number")


class Prose:
    """Filler without end: our sentences in one random order after the other, or ``filler`` from a random one on."""

    def __init__(self, rng: np.random.Generator, filler: Sequence[str] | None = None) -> None:
        self._rng = rng
        self._filler = filler
        self._first = 0 if filler is None else int(rng.integers(len(filler)))
        self.text = ""
        self.starts: list[int] = []

    def grow(self, size: int) -> None:
        """Makes sure of ``size`` characters."""
        parts, at = [self.text], len(self.text)
        while at < size:
            for sentence in self._round():
                parts.append(sentence + " ")
                self.starts.append(at)
                at += len(parts[-1])
        self.text = "".join(parts)

    def _round(self) -> Iterator[str]:
        if self._filler is None:
            return (SENTENCES[index] for index in self._rng.permutation(len(SENTENCES)))
        return (self._filler[(self._first + index) % len(self._filler)] for index in range(len(self._filler)))

    def woven(self, size: int, needles: Sequence[Needle]) -> str:
        """``size`` characters of filler with the needles between its sentences, each where its depth is nearest."""
        self.grow(size)
        possible = self.starts[: bisect.bisect_right(self.starts, size)] or [0]
        parts, at = [], 0
        for needle in sorted(needles, key=lambda needle: needle.depth):
            after = bisect.bisect_left(possible, needle.depth * size)
            near = possible[max(0, after - 1) : after + 1]
            place = min(near, key=lambda start: abs(start - needle.depth * size))
            parts += [self.text[at:place], needle.text, " "]
            at = place
        # Each character more makes the text one longer, so that no length is leapt over.
        text = "".join([*parts, self.text[at:size]])[:-1]
        return text[:-1] + "." if text.endswith(" ") else text


def fit(
    measure: Measure,
    needles: Sequence[Needle],
    document: Callable[[str], Document],
    length: int,
    rng: np.random.Generator,
) -> str:
    """A haystack with these needles for which ``document(haystack)`` has exactly ``length`` tokens.

    Raises:
        UserError: the needles and the question alone take more.
    """
    bare = " ".join(needle.text for needle in sorted(needles, key=lambda needle: needle.depth))
    least = measure.length(document(bare))
    if least > length:
        raise UserError(
            f"a length of {length} tokens is too short: the question and {len(needles)} hidden sentences "
            f"alone take {least}"
        )
    # Tokens grow with characters almost always by 0 or 1; where a merge leaps over the length, other prose will not.
    for _ in range(16):
        prose = Prose(rng, measure.filler)
        size = _search(lambda size, prose=prose: measure.length(document(prose.woven(size, needles))), measure, length)
        if size is not None:
            return prose.woven(size, needles)
    raise UserError(f"no text of exactly {length} tokens was found; take another length")


def _search(count: Callable[[int], int], measure: Measure, length: int) -> int | None:
    """A number of characters for which ``count`` is ``length``: by the mean rate, then by halves, then one by one."""
    low, high, size = 0, None, 0
    seen = {}
    for _ in range(64):
        seen[size] = count(size)
        missing = length - seen[size]
        if not missing:
            return size
        if missing > 0:
            low = max(low, size)
        else:
            high = size if high is None else min(high, size)
        size = size + round(missing * measure.characters) or size + (1 if missing > 0 else -1)
        if high is not None:
            if high - low <= 1:
                break
            if not low < size < high:
                size = (low + high) // 2
        elif size <= low:
            size = low + 1
    for near in range(max(0, low - 60), low + 60):
        if near not in seen and count(near) == length:
            return near
    return None
