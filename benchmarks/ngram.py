"""The bar the embedded teacher must clear: an interpolated modified Kneser-Ney n-gram model on the same tokens.

    python benchmarks/ngram.py [--sequence-length 256] [--out benchmarks/ngram.json]

Counts the training tokens of the embedded default, scores exactly the held-out tokens that ``Loader.held_out()`` gives
a model, with the context those sequences give it, and prints the loss per token by order and the embedded teacher's.
The best order is chosen on the held-out tokens themselves, which flatters the n-gram model. Half a minute on two cores.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from lizard_jax.config import DataConfig, RunConfig
from lizard_jax.convert.load import load_hf
from lizard_jax.data.loader import Loader
from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import teacher_config, teacher_path
from lizard_jax.train import stages

ORDERS = 10


@dataclass(frozen=True)
class Grams:
    """The distinct n-grams of one order. A gram is the key ``context id * V + token``, its id the rank of that key.

    ``ending`` is the id of the gram that ends at each position of the text, -1 where the document is too young, and
    ``example`` one such position for each gram.
    """

    keys: Int[np.ndarray, " grams"]
    ending: Int[np.ndarray, " n"]
    example: Int[np.ndarray, " grams"]


@dataclass(frozen=True)
class Order:
    """One order of a Kneser-Ney model: ``p(w|h) = share(hw) + left(h) p(w|h')`` with h' one token shorter.

    ``keys`` are those of ``Grams``. A context that nothing follows hands all to the order below: its ``left`` is 1.
    """

    keys: Int[np.ndarray, " grams"]
    share: Float[np.ndarray, " grams"]
    left: Float[np.ndarray, " contexts"]


def count(documents: list[Int[np.ndarray, " n"]], vocab_size: int, highest: int) -> tuple[list[Grams], np.ndarray]:
    """The n-grams of ``documents`` up to order ``highest``, and every position's place in its document."""
    tokens = np.concatenate(documents).astype(np.int64)
    place = np.concatenate([np.arange(len(document)) for document in documents])
    example = np.zeros(vocab_size, np.int64)
    example[tokens] = np.arange(len(tokens))
    levels = [Grams(np.arange(vocab_size), tokens, example)]
    for order in range(2, highest + 1):
        at = np.flatnonzero(place >= order - 1)
        keys, first, ids = np.unique(
            levels[-1].ending[at - 1] * vocab_size + tokens[at], return_index=True, return_inverse=True
        )
        ending = np.full(len(tokens), -1)
        ending[at] = ids
        levels.append(Grams(keys, ending, at[first]))
    return levels, place


def fit(levels: list[Grams], place: Int[np.ndarray, " n"], vocab_size: int) -> list[Order]:
    """An interpolated modified Kneser-Ney model whose highest order is ``len(levels)``.

    The highest order keeps its counts. A lower order counts how many different tokens stand before a gram, save where
    the gram opens a document and nothing can: there it keeps its count. A document's first token is never predicted.
    """
    orders = []
    contexts = 1
    for n, level in enumerate(levels, 1):
        size = len(level.keys)
        if n == len(levels):
            counts = np.bincount(level.ending[place >= max(n - 1, 1)], minlength=size)
        else:
            counts = np.bincount(level.ending[levels[n].example], minlength=size)
            if n > 1:
                counts += np.bincount(level.ending[place == n - 1], minlength=size)
        orders.append(_discount(level.keys, counts, vocab_size, contexts))
        contexts = size
    return orders


def _discount(keys: Int[np.ndarray, " grams"], counts: Int[np.ndarray, " grams"], vocab_size: int, size: int) -> Order:
    """Take a discount each from counts of one, two and more, set by the counts of counts, and hand it on."""
    n1, n2, n3, n4 = (max(int((counts == k).sum()), 1) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    taken = np.clip(discounts, 0.0, np.arange(4))[np.minimum(counts, 3)]
    context = keys // vocab_size
    total = np.bincount(context, weights=counts, minlength=size)
    freed = np.bincount(context, weights=taken, minlength=size)
    left = np.divide(freed, total, out=np.ones(size), where=total > 0)
    return Order(keys, (counts - taken) / total[context], left)


def score(
    orders: list[Order], tokens: Int[np.ndarray, "R L"], segments: Int[np.ndarray, "R L"], vocab_size: int
) -> Float[np.ndarray, "R L"]:
    """log p(token | the tokens before it in its row and segment), natural logarithm.

    The lowest order interpolates with the uniform distribution. Where the row gives a shorter context than an order
    wants, or one never seen, the order below speaks.
    """
    p = np.full(tokens.shape, 1 / vocab_size)
    context = np.zeros(tokens.shape, np.int64)
    for order in orders:
        known = context >= 0
        keys = np.where(known, context * vocab_size + tokens, -1)
        found = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
        hit = order.keys[found] == keys
        p = np.where(known, np.where(hit, order.share[found], 0.0) + order.left[context] * p, p)
        grams = np.where(hit, found, -1)
        context = np.full(tokens.shape, -1)
        context[:, 1:] = np.where(segments[:, 1:] == segments[:, :-1], grams[:, :-1], -1)
    return np.log(p)


def held_out_losses(loader: Loader, vocab_size: int, highest: int = ORDERS) -> tuple[dict[int, float], int]:
    """Mean loss per held-out token for models of order 1 to ``highest``, and the number of tokens scored."""
    levels, place = count(loader.training_documents(), vocab_size, highest)
    held_out = jax.tree.map(lambda *leaves: np.concatenate(leaves), *loader.held_out())
    scored = held_out.loss_mask > 0
    tokens = np.concatenate([held_out.inputs, held_out.targets[:, -1:]], axis=1)
    last = np.where(scored[:, -1:], held_out.segment_ids[:, -1:], -1)
    segments = np.concatenate([held_out.segment_ids, last], axis=1)
    losses = {}
    for n in range(1, highest + 1):
        log_p = score(fit(levels[:n], place, vocab_size), tokens, segments, vocab_size)[:, 1:]
        losses[n] = float(-log_p[scored].mean())
    return losses, int(scored.sum())


def teacher_loss(loader: Loader) -> float:
    """The embedded teacher's nats a token on the held-out tokens the n-grams are scored on."""
    model, run = load_hf(teacher_path()), RunConfig(stage=0)
    score = jax.jit(lambda model, batch: stages.evaluate(run, model, batch))
    sums = [jax.device_get(score(model, batch)) for batch in loader.held_out()]
    return stages.finish(jax.tree.map(lambda *parts: sum(parts), *sums))["loss"]


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description="An n-gram baseline on the embedded text.")
    parser.add_argument("--sequence-length", type=int, default=256, help="T of the held-out sequences")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ngram.json"), help="where the numbers go")
    args = parser.parse_args()
    started = time.perf_counter()
    vocab_size = teacher_config().vocab_size
    config = DataConfig(sequence_length=args.sequence_length)
    loader = Loader(config, load_tokenizer(teacher_path()), vocab_size=vocab_size)
    losses, scored = held_out_losses(loader, vocab_size)
    best = min(losses, key=lambda n: losses[n])
    print(f"{loader.num_tokens} training tokens, {scored} held-out tokens, T={args.sequence_length}")
    for n, loss in losses.items():
        print(f"order {n}   {loss:.4f} nats a token" + ("   best" if n == best else ""))
    teacher = teacher_loss(loader)
    print(f"embedded teacher   {teacher:.4f} nats a token")
    print(f"{time.perf_counter() - started:.0f} s")
    record = {
        "training_tokens": loader.num_tokens,
        "held_out_tokens": scored,
        "sequence_length": args.sequence_length,
        "loss_by_order": losses,
        "best_order": best,
        "best_loss": losses[best],
        "teacher_loss": teacher,
        "data_fingerprint": loader.fingerprint,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
