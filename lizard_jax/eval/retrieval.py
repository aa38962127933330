"""What the retrieval evaluations share: their flags, a model that writes on, a grid of scores as table and picture."""

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import batched
from typing import TYPE_CHECKING, Any

import numpy as np

from lizard_jax.errors import UserError
from lizard_jax.eval import _checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lizard_jax.data.haystack import Measure
    from lizard_jax.data.text import Document
    from lizard_jax.models.llama import Llama


def add_arguments(parser: argparse.ArgumentParser, *, lengths: Sequence[int], samples: str, form: bool = True) -> None:
    """The flags that every retrieval evaluation has."""
    _checkpoint.add_arguments(parser)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(lengths), metavar="N",
        help=f"tokens of an example in all (default {' '.join(map(str, lengths))})",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, metavar="N", help=samples)
    if form:
        from lizard_jax.data.haystack import FORMS

        parser.add_argument(
            "--form", choices=FORMS, default=FORMS[0],
            help="alpaca: question and answer as in Alpaca records; chat: through the tokenizer's chat template, the "
            "answer's first words given; plain: a sentence to end, for models that were never taught to answer "
            "(default %(default)s)",
        )  # fmt: skip
        parser.add_argument(
            "--filler", metavar="FILE", help="a text whose sentences hide the facts (default: prose of our own)"
        )
        parser.add_argument(
            "--teacher-forced", action="store_true",
            help="an answer counts where each of its tokens is the likeliest behind those before it: one pass over "
            "text and answer, and nothing is written (default: the greedy continuation counts)",
        )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the examples (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="examples read side by side (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="also write result.json and the picture there")


def check(args: argparse.Namespace, *more: str) -> None:
    """Refuses numbers below 1 (a seed below 0), and puts lengths in order.

    Raises:
        UserError: there is one.
    """
    for name in ("lengths", "samples", "batch", *more):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise UserError(f"--{name.replace('_', '-')} is {number}, must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}, must be at least 0")
    args.lengths = sorted(set(args.lengths))


def fits(vocab_size: int, prompts: Sequence[Sequence[int]]) -> None:
    """Refuses tokens that the model does not have.

    Raises:
        UserError: there is one.
    """
    from lizard_jax.generate.prompts import check_ids

    for prompt in prompts:
        check_ids(prompt, vocab_size, "an example")


def continuations(
    model: "Llama",
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new: Sequence[int],
    *,
    eos: Sequence[int] = (),
    batch: int = 8,
    tick: Callable[[int], Any] = lambda count: None,
) -> list[str]:
    """The greedy continuation of each prompt, without the token of ``eos`` that ends it.

    Args:
        new: most tokens written for each prompt.
        tick: told how many prompts are done after each batch.
    """
    from lizard_jax.generate import decode
    from lizard_jax.generate.sampling import Sampling

    greedy, stops = Sampling(), tuple(eos)
    size = min(batch, len(prompts))
    texts = []
    for group in batched(zip(prompts, new, strict=True), size):
        # A batch that is not full repeats its last row, so that one shape is compiled.
        rows = [list(prompt) for prompt, _ in group]
        rows += [rows[-1]] * (size - len(rows))
        limit = max(count for _, count in group)
        state = model.init_state(size, decode.capacity([len(row) for row in rows], limit))
        logits, state = decode.prefill(model, rows, state)
        carry = decode.start(logits, state, rows, greedy, stops=stops)
        blocks, left = [np.asarray(carry.token)[None]], limit - 1
        while left > 0 and bool(np.asarray(carry.alive).any()):
            block, carry = decode.write(model, carry, min(left, decode.BLOCK), greedy, stops=stops)
            blocks.append(block)
            left -= decode.BLOCK
        tokens = np.concatenate(blocks)
        decode.check_finite(model, tokens)
        for place, (_, count) in enumerate(group):
            row = [int(token) for token in tokens[:count, place] if token >= 0]
            # Special tokens inside stay visible: without them a broken answer might look like a right one.
            kept = row[:-1] if row and row[-1] in stops else row
            texts.append(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        tick(len(group))
    return texts


def likeliest(
    model: "Llama",
    measure: "Measure",
    documents: "Sequence[Document]",
    expected: Sequence[Sequence[str]],
    *,
    batch: int = 8,
    tick: Callable[[int], Any] = lambda count: None,
) -> list[float]:
    """Teacher-forced: of each document, the share of the expected strings of its answer of which every token is the
    likeliest behind the tokens before it.

    Args:
        tick: told how many documents are done after each batch.
    """
    import jax
    import jax.numpy as jnp

    from lizard_jax.nn import reuse

    @jax.jit
    @reuse.scope()
    def best(model: "Llama", tokens: Any, rows: Any) -> Any:
        return model.logits(jnp.take_along_axis(model.hidden(tokens), rows[..., None], axis=1)).argmax(-1)

    size = min(batch, len(documents))
    texts, places = [], []
    for document, strings in zip(documents, expected, strict=True):
        assert document.answers is not None
        texts.append(measure.prompt(document.text))
        starts = [document.text.index(string, document.answers[0][0]) for string in strings]
        spans = zip(starts, strings, strict=True)
        places.append([measure.covering(document.text, start, start + len(string)) for start, string in spans])
    length, most = max(map(len, texts)), max(sum(map(len, spans)) for spans in places)
    found = []
    for group in batched(zip(texts, places, strict=True), size):
        tokens, rows = np.zeros((size, length), np.int32), np.zeros((size, most), np.int32)
        for at, (text, spans) in enumerate(group):
            tokens[at, : len(text)] = text
            flat = [place - 1 for span in spans for place in span]
            rows[at, : len(flat)] = flat
        predicted = np.asarray(best(model, jnp.asarray(tokens), jnp.asarray(rows)))
        for at, (text, spans) in enumerate(group):
            ours = iter(predicted[at])
            right = [[int(next(ours)) == text[place] for place in span] for span in spans]
            found.append(sum(map(all, right)) / len(right))
        tick(len(group))
    return found


def show(title: str, rows: Sequence[tuple[str, Sequence[float | None]]], columns: Sequence[str], corner: str) -> None:
    """A table of scores from 0 to 1, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column(corner, justify="right")
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in rows:
        table.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    Console(highlight=False, soft_wrap=True).print(table)


def heat_map(
    values: Sequence[Sequence[float | None]], *, rows: Sequence[str], columns: Sequence[str], title: str, axes: str
) -> "Figure":
    """Scores from 0 (red) to 1 (green) as a grid; ``axes`` names what runs across and what runs down, by a comma."""
    from matplotlib.figure import Figure

    grid = np.array([[np.nan if value is None else value for value in row] for row in values], np.float64)
    figure = Figure(figsize=(2.5 + 0.8 * len(columns), 1.8 + 0.4 * len(rows)), layout="constrained")
    plot = figure.subplots()
    image = plot.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    plot.set_xticks(range(len(columns)), columns, rotation=45)
    plot.set_yticks(range(len(rows)), rows)
    across, down = axes.split(",")
    plot.set(title=title, xlabel=across.strip(), ylabel=down.strip())
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            if not np.isnan(value):
                plot.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="small")
    figure.colorbar(image, ax=plot)
    return figure


def note(text: str) -> None:
    """A line for the reader, beside the output."""
    print(text, file=sys.stderr, flush=True)
