"""Retrieval from long texts, task by task, in the manner of the RULER benchmark; our own words and texts.

python -m lizard_jax.eval ruler CKPT --lengths 1024 4096 16384 32768 --out results

- ``single``: one code is hidden, and asked for.
- ``multikey``: codes of several things are hidden, one is asked for.
- ``multivalue``: one thing has several codes, all are asked for.
- ``multiquery``: codes of several things are asked for, among those of twice as many.
- ``tracking``: a name gets a value, another name the first one's, and so on, beside a second such chain; asked for are
  all names with the value.

An example has exactly the given number of tokens, answer and EOS included, and depends on task, seed and number alone.
Its score is the share of the expected strings that stand in the greedy continuation as words of their own; with
--teacher-forced, of those whose tokens are all the likeliest in the true answer.

The last line of the output is ``score=… examples=…``.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lizard_jax.errors import UserError
from lizard_jax.eval import _checkpoint, results, retrieval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lizard_jax.data.haystack import Measure, Needle, Question
    from lizard_jax.data.text import Document
    from lizard_jax.models.llama import Llama

NAME = "ruler"
HELP = "retrieval tasks up to any length: single and multiple needles, several values and queries, variable tracking"

SAMPLES = 10
SHOWN = 25
"""Examples that result.json shows."""
DIGITS = 7
QUALITIES = (
    "amber", "brown", "calm", "dark", "empty", "frozen", "golden", "hollow", "iron", "jolly", "kind", "large",
    "muddy", "narrow", "old", "pale", "quiet", "red", "silver", "tall",
)  # fmt: skip
THINGS = (
    "anchor", "barrel", "candle", "door", "engine", "fiddle", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "oven", "pillow", "quarry", "rocket", "saddle", "tower",
)  # fmt: skip
TASK = "The text below holds some facts. Remember them."


@dataclass(frozen=True)
class Example:
    """One example: the whole text with its answer marked, and the strings its answer must hold."""

    document: "Document"
    expected: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The text up to the answer."""
        assert self.document.answers is not None
        return self.document.text[: self.document.answers[0][0]]


Made = tuple[list["Needle"], "Question", tuple[str, ...]]


def _things(rng: np.random.Generator, count: int) -> list[str]:
    picked = rng.choice(len(QUALITIES) * len(THINGS), count, replace=False)
    return [f"{QUALITIES[i // len(THINGS)]} {THINGS[i % len(THINGS)]}" for i in picked]


def _strings(rng: np.random.Generator, measure: "Measure", count: int) -> list[str]:
    """Different random codes."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(list(measure.alphabet), DIGITS))] = None
    return list(found)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _codes(
    rng: np.random.Generator, hidden: Sequence[tuple[str, str]], asked: Sequence[str], answers: Sequence[str]
) -> Made:
    """Codes of things: those hidden, the things asked for and the codes expected."""
    from lizard_jax.data.haystack import Needle, Question

    needles = [Needle(f"A code of the {thing} is {code}.", float(rng.random())) for thing, code in hidden]
    things = _listed([f"the {thing}" for thing in asked])
    plural = len(answers) > 1
    question = Question(
        TASK,
        f"What are the {len(answers)} codes of {things}?" if plural else f"What is the code of {things}?",
        f"The {len(answers)} codes of {things} are" if plural else f"A code of {things} is",
        _listed(answers),
    )
    return needles, question, tuple(answers)


def single(rng: np.random.Generator, measure: "Measure", count: int) -> Made:
    """One code."""
    (thing,), codes = _things(rng, 1), _strings(rng, measure, 1)
    return _codes(rng, [(thing, codes[0])], [thing], codes)


def multikey(rng: np.random.Generator, measure: "Measure", count: int) -> Made:
    """``count`` things with a code each; one is asked for."""
    things, codes = _things(rng, count), _strings(rng, measure, count)
    return _codes(rng, list(zip(things, codes, strict=True)), things[:1], codes[:1])


def multivalue(rng: np.random.Generator, measure: "Measure", count: int) -> Made:
    """One thing with ``count`` codes."""
    (thing,), codes = _things(rng, 1), _strings(rng, measure, count)
    return _codes(rng, [(thing, code) for code in codes], [thing], codes)


def multiquery(rng: np.random.Generator, measure: "Measure", count: int) -> Made:
    """``count`` things asked for among twice as many."""
    things, codes = _things(rng, 2 * count), _strings(rng, measure, 2 * count)
    return _codes(rng, list(zip(things, codes, strict=True)), things[:count], codes[:count])


def tracking(rng: np.random.Generator, measure: "Measure", count: int) -> Made:
    """Two chains of ``count`` names, each beginning with a value; the names of one are asked for."""
    from lizard_jax.data.haystack import Needle, Question

    letters = [chr(ord("A") + i) for i in range(26)]
    names: dict[str, None] = {}
    while len(names) < 2 * count:
        names["".join(rng.choice(letters, 4))] = None
    values = _strings(rng, measure, 2)
    needles = []
    for chain, value in zip((list(names)[:count], list(names)[count:]), values, strict=True):
        # In the order of the text, so that what a name stands for has been said before.
        depths = np.sort(rng.random(count))
        for name, source, depth in zip(chain, [value, *chain], depths, strict=False):
            needles.append(Needle(f"Let {name} be {source}.", float(depth)))
    expected = tuple(names)[:count]
    question = Question(
        TASK,
        f"Which {count} names have the value {values[0]}?",
        f"The {count} names with the value {values[0]} are",
        _listed(expected),
    )
    return needles, question, expected


TASKS: dict[str, Callable[[np.random.Generator, "Measure", int], Made]] = {
    task.__name__: task for task in (single, multikey, multivalue, multiquery, tracking)
}


def example(
    task: str, measure: "Measure", *, length: int, seed: int, index: int, needles: int = 4, form: Any = "alpaca"
) -> Example:
    """One example of exactly ``length`` tokens, a function of the arguments alone.

    Raises:
        UserError: it does not fit into the length.
    """
    from lizard_jax.data.haystack import fit

    rng = np.random.default_rng([seed, list(TASKS).index(task), length, needles, index])
    hidden, question, expected = TASKS[task](rng, measure, needles)
    tokenizer = measure.tokenizer
    haystack = fit(measure, hidden, lambda text: question.document(text, form, tokenizer), length, rng)
    return Example(question.document(haystack, form, tokenizer), expected)


def score(continuation: str, expected: Sequence[str]) -> float:
    """The share of the expected strings that stand in the text as words of their own."""
    return len(set(expected) & set(re.findall(r"\w+", continuation))) / len(expected)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this evaluation."""
    retrieval.add_arguments(
        parser, lengths=(1024, 2048, 4096),
        samples=f"examples for each task and length (default {SAMPLES})",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK",
        help=f"of {', '.join(TASKS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--needles", type=int, default=4, metavar="N",
        help="facts of the tasks with several: hidden (multikey), asked for (multivalue, multiquery), or names in a "
        "chain (tracking) (default %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, and writes what ``--out`` asks for.

    Raises:
        UserError: a number out of range, a length that cannot hold a task's facts, or no model.
    """
    from lizard_jax.data.haystack import Measure, filler
    from lizard_jax.data.text import load_tokenizer

    retrieval.check(args, "needles")
    if args.needles > len(QUALITIES) * len(THINGS) // 2:
        raise UserError(f"--needles is {args.needles}, must be at most {len(QUALITIES) * len(THINGS) // 2}")
    args.tasks = list(dict.fromkeys(args.tasks))
    out_dir = results.prepare(args.out)
    tokenizer = load_tokenizer(_checkpoint.tokenizer_source(args))
    ruler = Measure(tokenizer, filler(args.filler))
    for task in args.tasks:
        # A length that cannot be made is told before anything slow begins.
        example(task, ruler, length=args.lengths[0], seed=args.seed, index=0, needles=args.needles, form=args.form)

    from lizard_jax.generate.prompts import end_tokens

    model = _checkpoint.load(args)
    result = measure(
        model, ruler, tasks=args.tasks, lengths=args.lengths, samples=args.samples or SAMPLES, seed=args.seed,
        needles=args.needles, form=args.form, batch=args.batch, eos=end_tokens(model.source, tokenizer),
        teacher_forced=args.teacher_forced,
    )  # fmt: skip
    show(result)
    if out_dir is not None:
        results.write(out_dir, args, result, {"ruler.png": picture(result)})
    print(f"score={result['score']:.6f} examples={result['examples']}")


def measure(
    model: "Llama",
    ruler: "Measure",
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    needles: int = 4,
    form: str = "alpaca",
    batch: int = 8,
    eos: Sequence[int] = (),
    teacher_forced: bool = False,
) -> dict[str, Any]:
    """The score of every task and length.

    Args:
        teacher_forced: judge by the likeliest tokens behind the true ones, and write nothing.

    Returns:
        ``score`` (mean of all cells), ``examples`` (how many), ``cells`` (a list of ``task``, ``length``, ``score``,
        ``samples``) and ``shown`` (some examples: ``task``, ``length``, ``expected``, ``score``, and
        ``continuation`` where one was written).
    """
    from tqdm import tqdm

    cells, shown = [], []
    total = len(tasks) * len(lengths) * samples
    with tqdm(total=total, unit=" examples", disable=None, leave=False) as bar:
        for length in lengths:
            for task in tasks:
                bar.set_postfix(length=length, task=task)
                made = [
                    example(task, ruler, length=length, seed=seed, index=index, needles=needles, form=form)
                    for index in range(samples)
                ]
                prompts = [ruler.prompt(one.prompt) for one in made]
                retrieval.fits(model.config.vocab_size, prompts)
                written: list[dict[str, str]] = [{}] * samples
                if teacher_forced:
                    scores = retrieval.likeliest(
                        model, ruler, [one.document for one in made], [one.expected for one in made], batch=batch,
                        tick=bar.update,
                    )  # fmt: skip
                else:
                    # Room for half as much again as the answer takes, for a model that words it otherwise.
                    answers = [ruler.length(one.document) - len(ids) for one, ids in zip(made, prompts, strict=True)]
                    texts = retrieval.continuations(
                        model, ruler.tokenizer, prompts, [count + count // 2 + 8 for count in answers], eos=eos,
                        batch=batch, tick=bar.update,
                    )  # fmt: skip
                    scores = [score(text, one.expected) for text, one in zip(texts, made, strict=True)]
                    written = [{"continuation": text} for text in texts]
                cells.append({"task": task, "length": length, "score": sum(scores) / samples, "samples": samples})
                few = max(1, SHOWN // (len(tasks) * len(lengths)))
                shown += [
                    {"task": task, "length": length, "expected": list(one.expected), "score": share, **more}
                    for one, share, more in zip(made[:few], scores, written, strict=False)
                ]
    return {
        "score": sum(cell["score"] for cell in cells) / len(cells), "examples": total, "cells": cells, "shown": shown,
    }  # fmt: skip


def _grid(result: dict[str, Any]) -> tuple[list[int], list[str], list[list[float]]]:
    lengths = sorted({cell["length"] for cell in result["cells"]})
    tasks = list(dict.fromkeys(cell["task"] for cell in result["cells"]))
    found = {(cell["task"], cell["length"]): cell["score"] for cell in result["cells"]}
    return lengths, tasks, [[found[task, length] for length in lengths] for task in tasks]


def show(result: dict[str, Any]) -> None:
    """The table, on stdout."""
    lengths, tasks, values = _grid(result)
    mean = [sum(column) / len(column) for column in zip(*values, strict=True)]
    rows = [*zip(tasks, values, strict=True), ("mean", mean)]
    columns = [f"{length:,}" for length in lengths]
    retrieval.show("share of expected strings found, by task and tokens", rows, columns, "task")


def picture(result: dict[str, Any]) -> "Figure":
    """Task by length as a heat map."""
    lengths, tasks, values = _grid(result)
    return retrieval.heat_map(
        values, rows=tasks, columns=[f"{length:,}" for length in lengths],
        title=f"expected strings found: {result['score']:.3f}", axes="tokens, task",
    )  # fmt: skip
