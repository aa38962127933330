"""The report of ``--by error``: every head's curve, and what budgets split by the curves are worth on other texts."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from lizard_jax.atomic import write_atomic
from lizard_jax.config import DataConfig, LizardConfig
from lizard_jax.convert.files import teacher_dir
from lizard_jax.convert.load import load_hf
from lizard_jax.data.haystack import Measure
from lizard_jax.data.loader import Batch
from lizard_jax.data.records import documents
from lizard_jax.data.text import Document, load_tokenizer
from lizard_jax.embedded import corpus
from lizard_jax.errors import UserError
from lizard_jax.models.llama import Llama
from lizard_jax.nn.attention import mixer_of
from lizard_jax.select.budgets import Curves, Spent, measure, plain, size, spend, state_bytes
from lizard_jax.select.rank import loss_behind
from lizard_jax.typing import Int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = (1.5, 2.0, 4.0, 8.0)
"""Of the rows of the table, in windows."""
CHARACTERS = 32
"""More than a token has in any text: what is read of a document."""


@dataclass(frozen=True)
class Row:
    """A budget: windows of so many tokens would take as many bytes."""

    tokens: int
    spent: Spent
    loss: float
    window_loss: float


def texts(data: str, separator: str, measure: Measure, length: int, most: int) -> list[Int[np.ndarray, " T"]]:
    """The first ``length`` tokens of the first documents that have so many, an even number of them; of the embedded
    teacher's own training text where ``data`` is ``embedded``.

    Raises:
        UserError: there are not two.
    """
    long: list[Any] = []
    config = DataConfig(path=data, separator=separator, format="text")
    own = (Document(text) for text in corpus.documents("train"))
    for document in own if data == "embedded" else documents(config, measure.tokenizer):
        ids = measure.prompt(document.text[: CHARACTERS * length])[:length]
        if len(ids) == length:
            long.append(np.asarray(ids, np.int32))
        if len(long) == most:
            break
    if len(long) < 2:
        raise UserError(f"{data} has {len(long)} documents of {length} tokens; two are needed at least")
    return long[: len(long) - len(long) % 2]


def run(args: argparse.Namespace, out_dir: Path | None) -> None:
    """Measures, scores, prints the table, and writes what ``--out`` asks for.

    Raises:
        UserError: no such teacher or text, or a text too short.
    """
    source = teacher_dir(args.teacher)
    found = texts(args.data, args.separator, Measure(load_tokenizer(source)), args.length, args.samples + args.scored)
    model = load_hf(source, dtype=args.dtype)
    if model.config.attention is not None:
        raise UserError(f"{args.teacher} is linearized already; give the teacher that it came from")
    switches = LizardConfig(memory="none", window=args.window)
    half = len(found) // 2
    total = half * model.config.num_layers
    with tqdm(total=total, desc="measuring", unit=" layers", disable=None, leave=False) as bar:
        curves = measure(model, [batch_of(ids) for ids in found[:half]], switches, tick=bar.update)
    limits = [round(share * args.window) for share in BUDGETS if share * args.window < args.length]
    rows = []
    with tqdm(total=1 + 2 * len(limits), desc="scoring", unit=" rows", disable=None, leave=False) as bar:
        teacher = mean_loss(model, None, found[half:], args.window)
        bar.update()
        for tokens in limits:
            spent = spend(curves, size(f"{tokens}tokens", model.config, switches), model.config, switches)
            own = mean_loss(model, spent.switches, found[half:], args.window)
            bar.update()
            rows.append(
                Row(tokens, spent, own, mean_loss(model, plain(switches, window=tokens), found[half:], args.window))
            )
            bar.update()
    show(rows, teacher, state_bytes(replace(model.config, attention=None), 8192))
    if out_dir is not None:
        write(out_dir, args, curves, rows, teacher)
        print(f"curves={out_dir / 'budgets.json'}")


def batch_of(ids: Int[np.ndarray, " T"]) -> Batch:
    """One text as a batch of one row."""
    row = ids[None]
    ones = np.ones((1, len(ids) - 1), np.int32)
    return Batch(row[:, :-1], row[:, 1:], ones, ones.astype(np.float32))


def mean_loss(model: Llama, switches: LizardConfig | None, found: list[Int[np.ndarray, " T"]], window: int) -> float:
    """Nats a token behind the window, of the teacher or its untrained student."""
    config = replace(model.config, attention=switches)
    graph, state = nnx.split(model)
    student = nnx.merge(graph, state)
    for index, block in enumerate(student.layers):
        block.attention.mixer = mixer_of(config, index, rngs=nnx.Rngs(0))
    hidden = jax.jit(lambda model, ids: model.hidden(ids[None]))
    losses = []
    for ids in found:
        tokens = jnp.asarray(ids)
        losses.append(float(loss_behind(student, hidden(student, tokens), tokens, window)))
    return float(np.mean(losses))


def show(rows: list[Row], teacher: float, cache: int) -> None:
    """The table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"budgets split among key heads by need; no training; teacher {teacher:.3f}")
    for name in ("as a window of", "MiB", "of the cache at 8,192", "loss, nats", "loss of that window"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.tokens:,}", f"{row.spent.bytes / 2**20:.2f}", f"{row.spent.bytes / cache:.1%}", f"{row.loss:.3f}",
            f"{row.window_loss:.3f}",
        )  # fmt: skip
    Console(highlight=False, soft_wrap=True).print(table)


def write(out_dir: Path, args: argparse.Namespace, curves: Curves, rows: list[Row], teacher: float) -> None:
    """``budgets.png``, ``result.json``, and last ``budgets.json``."""
    import io

    png = io.BytesIO()
    picture(curves, rows, teacher).savefig(png, format="png", dpi=110)
    write_atomic(out_dir / "budgets.png", png.getvalue())
    plainly = [
        {"tokens": row.tokens, "bytes": row.spent.bytes, "loss": row.loss, "window_loss": row.window_loss,
         "budgets": row.spent.switches.budgets} for row in rows
    ]  # fmt: skip
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    result = {"teacher_loss": teacher, "rows": plainly, "settings": settings}
    write_atomic(out_dir / "result.json", json.dumps(result, indent=1) + "\n")
    write_atomic(out_dir / "budgets.json", curves.model_dump_json(indent=1) + "\n")


def picture(curves: Curves, rows: list[Row], teacher: float) -> "Figure":
    """What each head loses with its window alone, as a map, and what budgets are worth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    need, worth = figure.subplots(1, 2)
    least = max(float(curves.array[..., 0].max()) * 1e-4, np.finfo(np.float32).tiny)
    image = need.imshow(
        np.log10(np.maximum(curves.array[..., 0], least)).T, cmap="magma_r", aspect="auto", interpolation="nearest"
    )
    need.set(title=f"lost with a window of {curves.window} alone", xlabel="layer", ylabel="key head")
    need.set_yticks(range(curves.array.shape[1]))
    figure.colorbar(image, ax=need, label="log10 of nats a token")
    tokens = [row.tokens for row in rows]
    worth.plot(tokens, [row.loss for row in rows], "o-", label="split among key heads by need")
    worth.plot(tokens, [row.window_loss for row in rows], "s-", label="a window for every head")
    worth.axhline(teacher, color="k", linestyle="--", label="teacher")
    worth.set(
        title="text behind the window", xlabel="bytes, as tokens of a window", ylabel="nats a token", xscale="log"
    )
    worth.legend()
    return figure
