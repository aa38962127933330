"""Loss, perplexity and bits per byte of a text, by position, and given ever longer contexts.

python -m lizard_jax.eval perplexity CKPT --data text.txt

Each document (plain text is split at ``<|endoftext|>``) is read by itself, as the tokenizer begins it, in contexts of
the trained length: a longer document is cut, and every token but its first is predicted once. Position is the number
of tokens a prediction has seen.

Longer contexts: the documents are joined end to end, and the same last tokens, one trained length, are predicted from
contexts of 1, 2, 4 and 16 trained lengths that end with them.

Contexts are read in chunks through the model's state, so that a linearized model's memory does not depend on their
length. A softmax layer keeps its cache of the longest context.

The last line of the output is ``loss=… perplexity=… tokens=…``, loss in nats a token.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched
from typing import TYPE_CHECKING, Any

import numpy as np

from lizard_jax.errors import UserError
from lizard_jax.eval import _checkpoint, results, texts

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from matplotlib.figure import Figure

    from lizard_jax.models.llama import Llama

NAME = "perplexity"
HELP = "loss, perplexity and bits per byte, by position and by length of context"

EXTENTS = (1, 2, 4, 16)
CHUNK = 512
"""Tokens read at once."""
FIRST_BUCKET = 16
"""Positions of the first bucket; each further one ends at twice the last."""
POOL = 16
"""Batches whose contexts are sorted by length, so that little of a batch is padding."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this evaluation."""
    _checkpoint.add_arguments(parser)
    texts.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=65536, help="most tokens to predict (default %(default)s)")
    parser.add_argument(
        "--context-tokens", type=int, default=16384,
        help="most tokens to predict from each length of context; 0 leaves that part out (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="contexts read side by side (default %(default)s)")
    parser.add_argument("--length", type=int, help="trained length in tokens (default: the checkpoint's config)")
    parser.add_argument("--out", metavar="DIR", help="also write result.json and perplexity.png there")


def run(args: argparse.Namespace) -> None:
    """Measures, prints the tables, and writes what ``--out`` asks for.

    Raises:
        UserError: a number out of range, no model, or no text to score.
    """
    for name, least in (("tokens", 1), ("context_tokens", 0), ("batch", 1), ("length", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, must be at least {least}")
    texts.check_data(args.data)
    out_dir = results.prepare(args.out)

    from lizard_jax.generate.prompts import text_tokenizer

    model = _checkpoint.load(args)
    length = args.length or model.config.max_positions
    documents = texts.read(
        args.data, text_tokenizer(model.source), vocab_size=model.config.vocab_size, separator=args.separator,
        held_out=args.held_out,
    )  # fmt: skip
    result = measure(
        model, documents, length=length, tokens=args.tokens, context_tokens=args.context_tokens, batch=args.batch
    )
    show(result)
    if out_dir is not None:
        results.write(out_dir, args, result, {"perplexity.png": picture(result)})
    print(f"loss={result['loss']:.6f} perplexity={result['perplexity']:.6f} tokens={result['tokens']}")


# --------------------------------------------------------------------------------------------- the model's part


@functools.cache
def _steps() -> tuple[Callable, Callable]:
    """``read(model, tokens, state, lengths) -> state`` and ``score(model, tokens, targets, state, lengths) -> (loss of
    every target [B, T], state)``; the state is donated. Made when first needed: importing jax takes a second."""
    import jax

    from lizard_jax.nn import reuse

    @functools.partial(jax.jit, donate_argnums=(2,))
    @reuse.scope()
    def read(model: "Llama", tokens: Any, state: Any, lengths: Any) -> Any:
        return model.extend_hidden(tokens, state, lengths)[1]

    @functools.partial(jax.jit, donate_argnums=(3,))
    @reuse.scope()
    def score(model: "Llama", tokens: Any, targets: Any, state: Any, lengths: Any) -> Any:
        hidden, state = model.extend_hidden(tokens, state, lengths)
        return by_slices(model, lambda h, t: token_losses(model.logits(h), t), hidden, targets), state

    return read, score


def token_losses(logits: Any, targets: Any) -> Any:
    """``−log p(target)`` in nats for logits ``[B, T, V]`` and targets ``[B, T]``."""
    import jax
    import jax.numpy as jnp

    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def by_slices(model: "Llama", function: Callable, *arrays: Any) -> Any:
    """``function`` of arrays ``[B, T, …]``, applied to slices of T whose logits fit in memory, and joined again."""
    import jax
    import jax.numpy as jnp

    from lizard_jax.losses import LOGITS_AT_ONCE

    batch, time = arrays[0].shape[:2]
    slices = 1
    while time % (2 * slices) == 0 and batch * time * model.config.vocab_size > slices * LOGITS_AT_ONCE:
        slices *= 2
    if slices == 1:
        return function(*arrays)
    cut = [jnp.moveaxis(a.reshape(batch, slices, time // slices, *a.shape[2:]), 1, 0) for a in arrays]
    out = jax.lax.map(lambda parts: function(*parts), tuple(cut))
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(batch, time, *a.shape[3:]), out)


def context_losses(
    model: "Llama",
    rows: Sequence["Int[np.ndarray, ' n']"],
    *,
    unscored: int = 0,
    batch: int,
    capacity: int,
    chunk: int = CHUNK,
) -> list["Float[np.ndarray, ' m']"]:
    """The loss of each row's tokens behind its first ``unscored + 1``, given all that stand before them in the row.

    Args:
        rows: at most ``batch`` contexts of at least ``unscored + 2`` tokens.
        capacity: tokens that softmax layers make room for; at least those of the longest row.
        chunk: tokens read at once.
    """
    from lizard_jax.generate.decode import blocks

    read, score = _steps()
    chunk = min(chunk, CHUNK)
    state = model.init_state(batch, max(capacity, chunk))
    # A batch that is not full is filled with rows of no token, so that one shape is compiled.
    texts = [*map(list, rows), *[[]] * (batch - len(rows))]
    for _, tokens, lengths in blocks([text[:unscored] for text in texts], _chunks(unscored, chunk)):
        state = read(model, tokens, state, lengths)
    before, behind = [text[unscored:-1] for text in texts], [text[unscored + 1 :] for text in texts]
    spans = list(_chunks(max(map(len, before)), chunk))
    parts = []
    for (_, tokens, lengths), (_, targets, _) in zip(blocks(before, spans), blocks(behind, spans), strict=True):
        losses, state = score(model, tokens, targets, state, lengths)
        parts.append(np.asarray(losses, np.float64))
    whole = np.concatenate(parts, axis=1)
    return [whole[i, : len(row) - 1 - unscored] for i, row in enumerate(rows)]


def _chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and width of the chunks that cover ``total`` tokens, of two widths at most: each one is compiled."""
    for start in range(0, total, size):
        short = max(size // 4, 1)
        yield start, short if total - start <= short else size


# --------------------------------------------------------------------------------------------- the measurement


def measure(
    model: "Llama",
    documents: Iterable[texts.Tokens],
    *,
    length: int,
    tokens: int,
    context_tokens: int = 0,
    batch: int = 8,
) -> dict[str, Any]:
    """All numbers of this evaluation.

    Args:
        length: the trained length L.
        tokens: most tokens predicted for the main numbers; the last context is cut to fit.
        context_tokens: most tokens predicted from each length of context, rounded down to whole L, at least one L.

    Returns:
        ``loss`` (nats a token), ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes`` (of the text predicted),
        ``documents``, ``length``, ``positions`` (a list of ``first``, ``last``, ``loss``, ``tokens``: losses by the
        number of tokens seen) and ``contexts`` (a list of ``extent``, ``context``, ``loss``, ``perplexity``, ``error``
        (standard error of the mean over spans) and ``tokens``), empty where the text is too short.
    """
    from tqdm import tqdm

    reach = max(EXTENTS) * length + max(context_tokens // length - 1, 0) * length + 1
    taken, size, joined, joined_size = [], 0, [], 0
    for document in documents:
        if size >= tokens and (not context_tokens or joined_size >= reach):
            break
        if size < tokens:
            count = min(len(document.ids), tokens - size + 1)
            taken.append((document.ids[:count], int(document.sizes[1:count].sum())))
            size += count - 1
        if joined_size < reach:
            joined.append(document.ids[: reach - joined_size])
            joined_size += len(joined[-1])
    stream = np.concatenate(joined)
    extents, ends = _spans(len(stream), length, context_tokens) if context_tokens else ((), np.zeros(0, np.int64))
    if context_tokens and len(extents) < len(EXTENTS):
        print(
            f"note: {len(stream):,} tokens of text leave out contexts of "
            f"{', '.join(f'{e}x' for e in EXTENTS if e not in extents)} {length} tokens",
            file=sys.stderr,
        )

    sums = np.zeros(length)
    counts = np.zeros(length, np.int64)
    rows = (row for ids, _ in taken for row in texts.contexts(ids, length))
    todo = size + sum(extents) * length * len(ends)
    with tqdm(total=todo, unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        for group in _by_length(rows, batch):
            for losses in context_losses(model, group, batch=batch, capacity=length, chunk=length):
                sums[: len(losses)] += losses
                counts[: len(losses)] += 1
                bar.update(len(losses))
        found = []
        for extent in extents:
            bar.set_postfix(context=f"{extent}x")
            means = []
            for group in batched(ends, batch):
                spans = [stream[end - extent * length - 1 : end] for end in group]
                unscored = (extent - 1) * length
                losses = context_losses(
                    model, spans, unscored=unscored, batch=batch, capacity=extent * length, chunk=length
                )
                means += [float(row.mean()) for row in losses]
                bar.update(extent * length * len(group))
            found.append(_context(extent, length, means))

    text_bytes = sum(part for _, part in taken)
    loss = float(sums.sum() / counts.sum())
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": float(sums.sum() / math.log(2) / text_bytes) if text_bytes else None,
        "tokens": int(counts.sum()),
        "bytes": text_bytes,
        "documents": len(taken),
        "length": length,
        "positions": _buckets(sums, counts),
        "contexts": found,
    }


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is no number any more."""
    return math.exp(loss) if loss < 700 else math.inf


def _spans(total: int, length: int, context_tokens: int) -> tuple[tuple[int, ...], "Int[np.ndarray, ' n']"]:
    """The extents that ``total`` tokens have room for, and where the spans end that all of them predict."""
    extents = tuple(extent for extent in EXTENTS if extent * length + 1 <= total)
    if not extents:
        return (), np.zeros(0, np.int64)
    first = extents[-1] * length + 1
    count = min(max(context_tokens // length, 1), (total - first) // length + 1)
    return extents, first + length * np.arange(count)


def _by_length(rows: Iterator[Any], batch: int) -> Iterator[list[Any]]:
    """Batches of rows of about one length."""
    for pool in batched(rows, batch * POOL):
        for group in batched(sorted(pool, key=len, reverse=True), batch):
            yield list(group)


def _buckets(sums: "Float[np.ndarray, ' T']", counts: "Int[np.ndarray, ' T']") -> list[dict[str, Any]]:
    out, start, end = [], 0, FIRST_BUCKET
    while start < len(sums) and counts[start]:
        total = int(counts[start:end].sum())
        last = min(end, int(np.count_nonzero(counts)))
        out.append({"first": start + 1, "last": last, "loss": float(sums[start:end].sum() / total), "tokens": total})
        start, end = end, 2 * end
    return out


def _context(extent: int, length: int, means: list[float]) -> dict[str, Any]:
    loss = float(np.mean(means))
    error = float(np.std(means, ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    return {
        "extent": extent, "context": extent * length, "loss": loss, "perplexity": perplexity(loss), "error": error,
        "tokens": length * len(means),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- tables and picture


def show(result: dict[str, Any]) -> None:
    """The tables, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    bits = "-" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.4f}"
    console.print(
        f"{result['tokens']:,} tokens of {result['documents']:,} documents, contexts of {result['length']:,}: "
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.3f}, {bits} bits per byte"
    )
    where = Table(title="by position: tokens seen before the one predicted")
    for name in ("tokens seen", "loss", "perplexity", "tokens"):
        where.add_column(name, justify="right")
    for row in result["positions"]:
        where.add_row(
            f"{row['first']:,}-{row['last']:,}", f"{row['loss']:.4f}", f"{perplexity(row['loss']):.3f}",
            f"{row['tokens']:,}",
        )  # fmt: skip
    console.print(where)
    if result["contexts"]:
        long = Table(title=f"the same {result['contexts'][0]['tokens']:,} tokens from longer contexts")
        for name in ("context", "loss", "standard error", "perplexity"):
            long.add_column(name, justify="right")
        for row in result["contexts"]:
            error = "-" if row["error"] is None else f"{row['error']:.4f}"
            context = f"{row['extent']}x = {row['context']:,}"
            long.add_row(context, f"{row['loss']:.4f}", error, f"{row['perplexity']:.3f}")
        console.print(long)


def picture(result: dict[str, Any]) -> "Figure":
    """Loss by position, and by length of context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    near, far = figure.subplots(1, 2)
    middle = [(row["first"] + row["last"]) / 2 for row in result["positions"]]
    near.plot(middle, [row["loss"] for row in result["positions"]], marker="o")
    near.set(title="by position", xlabel="tokens seen", ylabel="loss, nats a token", xscale="log")
    far.set(title="the same tokens from longer contexts", xlabel="context, trained lengths", ylabel="loss")
    if rows := result["contexts"]:
        extents = [row["extent"] for row in rows]
        far.errorbar(extents, [row["loss"] for row in rows], [row["error"] or 0.0 for row in rows], marker="o")
        far.set_xscale("log")
        far.minorticks_off()
        far.set_xticks(extents, [f"{extent}×" for extent in extents])
    return figure
