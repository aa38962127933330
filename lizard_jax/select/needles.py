"""Texts with a needle whose answer is known token by token: what heads are ranked and scored on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from lizard_jax.data.haystack import Measure
from lizard_jax.data.passkey import PasskeySet
from lizard_jax.errors import UserError


@dataclass(frozen=True)
class Needles:
    """Texts of one length, each with an answer at its end and the same string hidden before.

    Attributes:
        tokens: ``[B, T]`` text and answer, without EOS.
        rows: ``[B, A]`` positions whose next token is one of the answer's; ``answers`` ``[B, A]`` those tokens.
        real: ``[B, A]`` which of them there are: answers differ in length.
        hidden: ``[B, T]`` the tokens of the hidden answer.
    """

    tokens: Int[np.ndarray, "B T"]
    rows: Int[np.ndarray, "B A"]
    answers: Int[np.ndarray, "B A"]
    real: Bool[np.ndarray, "B A"]
    hidden: Bool[np.ndarray, "B T"]


def make(measure: Measure, length: int, count: int, *, seed: int) -> Needles:
    """Texts of ``length`` tokens whose last sentence is to be ended with a string of five tokens told once before.

    Raises:
        UserError: the length cannot hold them.
    """
    return needles(PasskeySet(measure, length, 1, (5, 5), "plain", seed), range(count))


def needles(examples: PasskeySet, indices: Sequence[int]) -> Needles:
    """The examples of these numbers, filled up at the end to one length.

    Raises:
        UserError: the tokenizer splits a hidden answer and its sentence so that they cannot be told apart.
    """
    measure: Measure = examples.measure
    made = []
    for index in indices:
        example = examples[index]
        prompt = measure.prompt(example.prompt)
        assert example.document.answers is not None
        whole = measure.prompt(example.document.text[: example.document.answers[0][1]])
        # The hidden one is the first: the question does not say the answer, and no other needle is it.
        start = example.prompt.index(f" {example.answer}.")
        span = measure.covering(example.prompt, start, start + 1 + len(example.answer))
        shared = next((n for n, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
        if not span or shared < 1 or shared >= len(whole):
            raise UserError("the tokenizer does not tell the answer from the text before it; take another --form")
        made.append((whole, shared, span))
    length = max(len(whole) for whole, _, _ in made)
    longest = max(len(whole) - shared for whole, shared, _ in made)
    tokens, hidden = np.zeros((len(made), length), np.int32), np.zeros((len(made), length), np.bool_)
    rows, answers = np.zeros((len(made), longest), np.int32), np.zeros((len(made), longest), np.int32)
    real = np.zeros((len(made), longest), np.bool_)
    for i, (whole, shared, span) in enumerate(made):
        count = len(whole) - shared
        tokens[i, : len(whole)] = whole
        hidden[i, span] = True
        rows[i, :count] = np.arange(shared - 1, len(whole) - 1)
        answers[i, :count] = whole[shared:]
        real[i, :count] = True
    return Needles(tokens, rows, answers, real, hidden)
