"""The passkey set: some passkeys at random places of a long text, and a question for one of them.

By default five passkeys of 5 to 8 tokens, as in the paper. Each example is a function of the seed and its index alone,
for any tokenizer, and has an exact number of tokens: what the tokenizer puts in front, prompt, answer and EOS together.
Examples for training and for testing never come from the same random numbers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lizard_jax.data.haystack import Form, Measure, Needle, Question, fit
from lizard_jax.data.text import Document
from lizard_jax.errors import UserError

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Karl", "Laura", "Mia", "Noah",
    "Olga", "Paul", "Quinn", "Rosa", "Simon", "Tina", "Uma", "Victor", "Wanda", "Xaver", "Yara", "Zoe", "Adam", "Bella",
    "Clara", "Daniel", "Elsa", "Frank", "Greta", "Hugo", "Irene", "Jonas", "Kira", "Leo", "Marta", "Nora", "Oscar",
    "Petra", "Ralf", "Sara", "Tom", "Vera", "Walter", "Zara",
)  # fmt: skip
TASK = "The text below tells the passkeys of some people. Remember them."


@dataclass(frozen=True)
class Passkey:
    """One example.

    Attributes:
        document: the whole text, its answer marked.
        record: the same as an Alpaca record.
        answer: the passkey that is asked for.
        keys: all that are hidden, in the order of the text.
        depth: where in the prompt the answer stands, 0 to 1.
    """

    document: Document
    record: dict[str, str]
    answer: str
    keys: tuple[str, ...]
    depth: float

    @property
    def prompt(self) -> str:
        """The text up to the answer."""
        assert self.document.answers is not None
        return self.document.text[: self.document.answers[0][0]]


@dataclass(frozen=True)
class PasskeySet:
    """Passkey examples of one length, by index.

    Attributes:
        length: tokens of an example in all.
        keys: how many passkeys are hidden.
        key_tokens: the fewest and the most tokens of a passkey.
        form: Alpaca record, chat or plain text.
        training: examples to train on, apart from those to test with.
        depths: an example to test with asks for a passkey in the ``index % depths``-th part of the filler, so that
            every part is asked for equally often. The others, and all in training, lie anywhere.

    Raises:
        UserError: a number out of range, or a length that cannot hold the passkeys (when an example is made).
    """

    measure: Measure
    length: int
    keys: int = 5
    key_tokens: tuple[int, int] = (5, 8)
    form: Form = "alpaca"
    seed: int = 0
    training: bool = False
    depths: int = 10

    def __post_init__(self) -> None:
        low, high = self.key_tokens
        if not 1 <= low <= high:
            raise UserError(f"passkeys of {low} to {high} tokens cannot be made; give 1 or more, the smaller first")
        if not 1 <= self.keys <= len(NAMES):
            raise UserError(f"{self.keys} passkeys cannot be hidden; take 1 to {len(NAMES)}")
        if self.seed < 0 or self.length < 1 or self.depths < 1:
            raise UserError("a seed must not be negative, and lengths and depths must be at least 1")

    def __getitem__(self, index: int) -> Passkey:
        rng = np.random.default_rng([self.seed, int(self.training), self.length, index])
        names = [NAMES[i] for i in rng.permutation(len(NAMES))[: self.keys]]
        keys = self._strings(rng)
        depths = rng.random(self.keys)
        if not self.training:
            depths[0] = (index % self.depths + depths[0]) / self.depths
        # The first is asked for; its name, its string and its place are as random as the others'.
        needles = [
            Needle(f"{name}'s passkey is {key}.", float(at)) for name, key, at in zip(names, keys, depths, strict=True)
        ]
        question = Question(TASK, f"What is {names[0]}'s passkey?", f"{names[0]}'s passkey is", keys[0])
        tokenizer = self.measure.tokenizer
        haystack = fit(
            self.measure, needles, lambda text: question.document(text, self.form, tokenizer), self.length, rng
        )
        document = question.document(haystack, self.form, tokenizer)
        order = sorted(range(self.keys), key=lambda i: depths[i])
        at = document.text.index(needles[0].text)
        assert document.answers is not None
        return Passkey(
            document=document,
            record=question.record(haystack),
            answer=keys[0],
            keys=tuple(keys[i] for i in order),
            depth=at / document.answers[0][0],
        )

    @cached_property
    def _before(self) -> str:
        """What a passkey stands behind, where it is the answer."""
        return "### Response:\n" if self.form == "alpaca" else "passkey is "

    def _strings(self, rng: np.random.Generator) -> list[str]:
        low, high = self.key_tokens
        keys: list[str] = []
        for _ in range(20 * self.keys):
            key = self.measure.random_string(rng, int(rng.integers(low, high + 1)), self._before)
            if key not in keys:
                keys.append(key)
            if len(keys) == self.keys:
                return keys
        raise UserError(f"{self.keys} different passkeys of {low} to {high} tokens cannot be made; make them longer")


def training_lines(sets: Sequence[PasskeySet], count: int) -> Iterator[str]:
    """``count`` lines of JSON to train on, Alpaca records, from the sets in turn."""
    for index in range(count):
        yield json.dumps(sets[index % len(sets)][index // len(sets)].record, ensure_ascii=False) + "\n"
