"""Multi-query associative recall: pairs of random tokens, then each first one again, to be followed by its second.

python -m lizard_jax.eval recall CKPT --pairs 4 8 16 32 --lengths 256 512 1024 --out results

A sequence is what the tokenizer puts in front of a text, then ``k₁ v₁ … k_P v_P``, then random tokens, with each pair
``k v`` once more at a random place among them. Scored is the prediction behind each second ``k``. All tokens are drawn
from the vocabulary itself, special ones aside, so any model of at least 2P + 1 ordinary tokens can be asked; the random
tokens are neither keys nor values. It takes no words, no question and no training, so it measures what the attention
can look up.

``accuracy`` asks that the value is the likeliest of the whole vocabulary, ``among values`` that it is the likeliest of
the values in the sequence (by chance 1/P).

The last line of the output is ``accuracy=… among_values=… queries=…``.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from itertools import batched
from typing import TYPE_CHECKING, Any

import numpy as np

from lizard_jax.errors import UserError
from lizard_jax.eval import _checkpoint, results, retrieval

if TYPE_CHECKING:
    from jaxtyping import Int
    from matplotlib.figure import Figure

    from lizard_jax.models.llama import Llama

NAME = "recall"
HELP = "associative recall of random token pairs: accuracy by pairs and length"

SAMPLES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this evaluation."""
    retrieval.add_arguments(
        parser, lengths=(256, 512, 1024),
        samples=f"sequences for each length and number of pairs (default {SAMPLES})", form=False,
    )  # fmt: skip
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[4, 8, 16, 32], metavar="P",
        help="numbers of pairs in a sequence (default 4 8 16 32)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, and writes what ``--out`` asks for.

    Raises:
        UserError: a number out of range, a length or a vocabulary that cannot hold the pairs, or no model.
    """
    retrieval.check(args, "pairs")
    args.pairs = sorted(set(args.pairs))
    out_dir = results.prepare(args.out)

    from lizard_jax.data.text import affixes, load_tokenizer

    tokenizer = load_tokenizer(_checkpoint.tokenizer_source(args))
    head = affixes(tokenizer)[0]
    tokens = ordinary(tokenizer)
    for length in args.lengths:
        for pairs in args.pairs:
            check(length, pairs, head, tokens)
    model = _checkpoint.load(args)
    result = measure(
        model, head, tokens, lengths=args.lengths, pairs=args.pairs, samples=args.samples or SAMPLES, seed=args.seed,
        batch=args.batch,
    )  # fmt: skip
    show(result)
    if out_dir is not None:
        results.write(out_dir, args, result, {"recall.png": picture(result)})
    print(f"accuracy={result['accuracy']:.6f} among_values={result['among_values']:.6f} queries={result['queries']}")


# ------------------------------------------------------------------------------------------------ the sequences


def ordinary(tokenizer: Any) -> "Int[np.ndarray, ' n']":
    """Ids of the tokens that stand for text."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return np.array(sorted({*tokenizer.get_vocab().values()} - special))


def check(length: int, pairs: int, head: Sequence[int], tokens: Sequence[int] | np.ndarray) -> None:
    """Refuses what cannot be made.

    Raises:
        UserError: too short for the pairs, or too small a vocabulary.
    """
    if length < len(head) + 4 * pairs:
        raise UserError(f"a length of {length} tokens is too short for {pairs} pairs; take {len(head) + 4 * pairs}")
    if len(tokens) < 2 * pairs + 1:
        raise UserError(f"a vocabulary of {len(tokens)} ordinary tokens has not {2 * pairs + 1} for {pairs} pairs")


def sequence(
    head: Sequence[int], tokens: "Int[np.ndarray, ' n']", *, length: int, pairs: int, seed: int, index: int
) -> tuple["Int[np.ndarray, ' T']", "Int[np.ndarray, ' P']", "Int[np.ndarray, ' P']"]:
    """One sequence of ``length`` tokens, the places of its queries, and its values; a function of the arguments alone.

    The token behind a query is its value.

    Raises:
        UserError: it cannot be made of these.
    """
    check(length, pairs, head, tokens)
    rng = np.random.default_rng([seed, length, pairs, index])
    order = rng.permutation(tokens)
    keys, values, others = order[:pairs], order[pairs : 2 * pairs], order[2 * pairs :]
    row = np.asarray([*head, *np.stack([keys, values], 1).ravel(), *rng.choice(others, length)])[:length]
    first = len(head) + 2 * pairs
    # Pairs at random places that do not overlap: places among the rest with each pair shrunk to one token.
    places = first + np.sort(rng.permutation(length - first - pairs)[:pairs]) + np.arange(pairs)
    asked = rng.permutation(pairs)
    row[places], row[places + 1] = keys[asked], values[asked]
    return row.astype(np.int32), places.astype(np.int32), values.astype(np.int32)


# ------------------------------------------------------------------------------------------------ the measurement


@functools.cache
def _read() -> Callable:
    """``read(model, tokens, state, held, places) -> (held, state)``: the hidden states ``[B, P, D]`` at the queries'
    places, counted from this chunk's start, put among those held; state and held are donated."""
    import jax
    import jax.numpy as jnp

    from lizard_jax.nn import reuse

    @functools.partial(jax.jit, donate_argnums=(2, 3))
    @reuse.scope()
    def read(model: "Llama", tokens: Any, state: Any, gathered: Any, places: Any, lengths: Any) -> Any:
        hidden, state = model.extend_hidden(tokens, state, lengths)
        inside = (places >= 0) & (places < tokens.shape[1])
        found = jnp.take_along_axis(hidden, jnp.clip(places, 0, tokens.shape[1] - 1)[..., None], axis=1)
        return jnp.where(inside[..., None], found, gathered), state

    return read


@functools.cache
def _judge() -> Callable:
    """``judge(model, hidden [B, P, D], values [B, P]) -> (likeliest token, likeliest of the values), both [B, P]``."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def judge(model: "Llama", hidden: Any, values: Any) -> Any:
        def one(parts: Any) -> Any:
            row, own = parts
            logits = model.logits(row[None])[0]
            return jnp.argmax(logits, -1), own[jnp.argmax(logits[:, own], -1)]

        return jax.lax.map(one, (hidden, values))

    return judge


def predictions(
    model: "Llama", rows: "Int[np.ndarray, 'B T']", places: "Int[np.ndarray, 'B P']", values: "Int[np.ndarray, 'B P']"
) -> tuple["Int[np.ndarray, 'B P']", "Int[np.ndarray, 'B P']"]:
    """What the model predicts behind each query: of the whole vocabulary, and of the row's values."""
    import jax.numpy as jnp

    from lizard_jax.generate.decode import PREFILL, blocks, capacity, chunks

    size, time = rows.shape
    state = model.init_state(size, capacity([time], 0))
    gathered = jnp.zeros((*places.shape, model.config.hidden_size), model.embed.embedding.dtype)
    for start, tokens, lengths in blocks(rows.tolist(), chunks([time], PREFILL)):
        gathered, state = _read()(model, tokens, state, gathered, jnp.asarray(places - start), lengths)
    likeliest, among = _judge()(model, gathered, jnp.asarray(values))
    return np.asarray(likeliest), np.asarray(among)


def measure(
    model: "Llama",
    head: Sequence[int],
    tokens: "Int[np.ndarray, ' n']",
    *,
    lengths: Sequence[int],
    pairs: Sequence[int],
    samples: int,
    seed: int = 0,
    batch: int = 8,
) -> dict[str, Any]:
    """Accuracy of every length and number of pairs.

    Args:
        head: tokens in front of each sequence.
        tokens: those that sequences are made of.

    Returns:
        ``accuracy``, ``among_values``, ``queries`` (how many) and ``cells`` (a list of ``length``, ``pairs``,
        ``accuracy``, ``among_values``, ``chance`` (of the latter), ``queries``).
    """
    from tqdm import tqdm

    tokens = tokens[tokens < model.config.vocab_size]
    cells = []
    with tqdm(
        total=samples * sum(lengths) * len(pairs), unit=" tokens", unit_scale=True, disable=None, leave=False
    ) as bar:
        for length in lengths:
            for count in pairs:
                bar.set_postfix(length=length, pairs=count)
                exact, among = [], []
                size = min(batch, samples)
                for group in batched(range(samples), size):
                    made = [
                        sequence(head, tokens, length=length, pairs=count, seed=seed, index=index) for index in group
                    ]
                    # A batch that is not full repeats its last row, so that one shape is compiled.
                    made += [made[-1]] * (size - len(made))
                    rows, places, values = (np.stack(parts) for parts in zip(*made, strict=True))
                    right = np.take_along_axis(rows, places + 1, axis=1)
                    for best, scores in zip(predictions(model, rows, places, values), (exact, among), strict=True):
                        scores.append((best == right)[: len(group)].ravel())
                    bar.update(length * len(group))
                cells.append(
                    {
                        "length": length,
                        "pairs": count,
                        "accuracy": float(np.concatenate(exact).mean()),
                        "among_values": float(np.concatenate(among).mean()),
                        "chance": 1 / count,
                        "queries": samples * count,
                    }
                )
    queries = sum(cell["queries"] for cell in cells)
    means = {
        name: sum(cell[name] * cell["queries"] for cell in cells) / queries for name in ("accuracy", "among_values")
    }
    return {**means, "queries": queries, "cells": cells}


# ------------------------------------------------------------------------------------------------ table and picture


def _grid(result: dict[str, Any], name: str) -> tuple[list[int], list[int], list[list[float]]]:
    lengths = sorted({cell["length"] for cell in result["cells"]})
    pairs = sorted({cell["pairs"] for cell in result["cells"]})
    found = {(cell["length"], cell["pairs"]): cell[name] for cell in result["cells"]}
    return lengths, pairs, [[found[length, count] for length in lengths] for count in pairs]


def show(result: dict[str, Any]) -> None:
    """The tables, on stdout."""
    for name, title in (("accuracy", "values recalled"), ("among_values", "likeliest of the sequence's values")):
        lengths, pairs, values = _grid(result, name)
        rows = [
            (f"{count} (chance {1 / count:.3f})" if name == "among_values" else str(count), line)
            for count, line in zip(pairs, values, strict=True)
        ]
        retrieval.show(f"{title}, by pairs and tokens", rows, [f"{length:,}" for length in lengths], "pairs")


def picture(result: dict[str, Any]) -> "Figure":
    """Both accuracies over the number of pairs, a line for each length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for plot, name, title in zip(
        figure.subplots(1, 2), ("accuracy", "among_values"), ("of the whole vocabulary", "of the sequence's values"),
        strict=True,
    ):  # fmt: skip
        lengths, pairs, values = _grid(result, name)
        for column, length in enumerate(lengths):
            plot.plot(pairs, [line[column] for line in values], marker="o", label=f"{length:,} tokens")
        if name == "among_values":
            plot.plot(pairs, [1 / count for count in pairs], color="gray", linestyle="--", label="chance")
        plot.set_xscale("log", base=2)
        plot.set_xticks(pairs, [str(count) for count in pairs])
        plot.set(title=f"value is the likeliest {title}", xlabel="pairs", ylabel="accuracy", ylim=(-0.03, 1.03))
        plot.legend()
    return figure
