"""How close a student is to its teacher: layer by layer, in what it predicts, where it looks, and what it writes.

python -m lizard_jax.eval fidelity STUDENT --teacher TEACHER --data held_out.txt --out DIR

Layers are compared as stage 1 scores them: each layer of the student is given the teacher's hidden state, and its head
outputs (before the output projection) stand against the teacher's. The relative error is |student - teacher| /
|teacher|, both norms over all tokens and heads.

Predictions are compared with each model run by itself: the mean of KL(teacher || student) over the next-token
distributions, and how often both have the same most likely token.

Attention maps show, for one short text, the weight that every token has for every other: the teacher's softmax, and
the student's whole weight as the sum of its window, its gated memory and its meta memory (a share for each query).
Distance is the total variation between teacher and student rows, 0 to 1.

Documents are read by themselves, in contexts of the trained length. Generations are greedy.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lizard_jax.errors import UserError
from lizard_jax.eval import results, texts
from lizard_jax.eval.perplexity import by_slices, token_losses

if TYPE_CHECKING:
    from jaxtyping import Int
    from matplotlib.figure import Figure

    from lizard_jax.eval.maps import Maps
    from lizard_jax.models.llama import Llama

NAME = "fidelity"
HELP = "student against teacher: layer errors, KL, agreement, attention maps and generations side by side"

LONGEST = 2048
"""Contexts are no longer than this unless asked for: the teacher's attention is formed whole."""
MAP_TOKENS = (64, 256)
"""Fewest and most tokens of the text whose maps are drawn unless asked for; between them, two windows."""
FAINTEST = 1e-4
"""Weights below this are drawn white."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this evaluation."""
    parser.add_argument("checkpoint", metavar="STUDENT", help="HF directory or hub id, Flax or stage directory")
    parser.add_argument("--teacher", required=True, metavar="TEACHER", help="what the student is compared with")
    texts.add_arguments(parser)
    parser.add_argument("--show", metavar="PATH", help="data for the maps and the continuations (default: --data)")
    parser.add_argument("--tokens", type=int, default=16384, help="most tokens to compare on (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="contexts read side by side (default %(default)s)")
    parser.add_argument(
        "--length", type=int, help=f"tokens of a context (default: the trained length, at most {LONGEST})"
    )
    parser.add_argument(
        "--map-tokens", type=int,
        help=f"tokens of the text whose attention is drawn (default: two windows, {MAP_TOKENS[0]} to {MAP_TOKENS[1]})",
    )  # fmt: skip
    parser.add_argument("--layers", help="layers to draw, as 0,7,15 (default: first, middle and last)")
    parser.add_argument("--heads", type=int, default=4, help="heads to draw of each layer (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=4, help="texts to continue; 0 for none (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens of each prompt (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to write (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="write result.json, the pictures and generations.md there")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as stored)"
    )


def _student(args: argparse.Namespace) -> Any:
    """The student; a stage whose teacher has moved is read with the one it is compared with."""
    import lizard_jax
    from pallas_kernels import partition

    try:
        return lizard_jax.load(args.checkpoint, dtype=args.dtype, mesh=partition.mesh())
    except UserError as error:
        if not (Path(args.checkpoint).expanduser() / "run.json").is_file():
            raise
        try:
            return lizard_jax.load(args.checkpoint, dtype=args.dtype, teacher=args.teacher, mesh=partition.mesh())
        except UserError:
            raise error from None


def run(args: argparse.Namespace) -> None:
    """Measures, prints the tables, and writes what ``--out`` asks for.

    Raises:
        UserError: a number out of range, models that do not belong together, or no text to compare on.
    """
    for name, least in (
        ("tokens", 1), ("batch", 1), ("length", 1), ("map_tokens", 2), ("heads", 1), ("prompts", 0),
        ("prompt_tokens", 1), ("max_new_tokens", 1),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}, must be at least {least}")
    chosen = layer_numbers(args.layers)
    texts.check_data(args.data)
    if args.show is not None:
        texts.check_data(args.show)
    out_dir = results.prepare(args.out)

    import lizard_jax
    from lizard_jax.generate.prompts import end_tokens, text_tokenizer
    from pallas_kernels import partition

    student = _student(args)
    teacher = lizard_jax.load(args.teacher, dtype=args.dtype, mesh=partition.mesh())
    check_pair(student, teacher)
    count = student.config.num_layers
    if chosen and max(chosen) >= count:
        raise UserError(f"--layers names layer {max(chosen)}, but the student has {count}, from 0 to {count - 1}")
    length = args.length or min(student.config.max_positions, LONGEST)
    tokenizer = text_tokenizer(student.source)
    read = functools.partial(
        texts.read, tokenizer=tokenizer, vocab_size=student.config.vocab_size, separator=args.separator
    )
    documents, size = [], 0
    for document in read(args.data, held_out=args.held_out):
        documents.append(document.ids[: args.tokens - size + 1])
        size += len(documents[-1]) - 1
        if size >= args.tokens:
            break

    result = measure(student, teacher, documents, length=length, batch=args.batch)
    to_show = documents if args.show is None else [document.ids for document in itertools.islice(read(args.show), 64)]
    shown = map_text(to_show, args.map_tokens or map_size(student))
    found = attention_maps(student, teacher, shown)
    for row, (theirs, ours) in zip(result["layers"], found, strict=True):
        row.update(shares(theirs, ours))
    prompts = [ids[: args.prompt_tokens] for ids in to_show if len(ids) > args.prompt_tokens][: args.prompts]
    result["map_text"] = tokenizer.decode(shown)
    result["generations"] = generations(
        student, teacher, prompts, tokenizer, args.max_new_tokens, end_tokens(student.source, tokenizer)
    )
    show(result)
    if out_dir is not None:
        drawn = chosen or sorted({0, count // 2, count - 1})
        pictures = {f"attention_layer{n}.png": picture(*found[n], args.heads, n) for n in drawn}
        written = {"generations.md": side_by_side(result["generations"])} if result["generations"] else {}
        results.write(out_dir, args, result, pictures | {"layers.png": layer_picture(result)}, **written)


def layer_numbers(text: str | None) -> list[int]:
    """The numbers in ``0,7,15``; none where nothing is given.

    Raises:
        UserError: it is no such list.
    """
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--layers is {text!r}; give numbers of layers, as 0,7,15")
    return sorted({int(part) for part in parts})


def check_pair(student: "Llama", teacher: "Llama") -> None:
    """Refuses models whose layers and predictions cannot be held against each other.

    Raises:
        UserError: they differ in a size.
    """
    for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "head_dim"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise UserError(
                f"the student has {name}={ours} and the teacher {theirs}; give the teacher that the student came from"
            )


# --------------------------------------------------------------------------------------------- layers and predictions


@functools.cache
def _compare() -> Callable:
    """``(student, teacher, inputs, targets, segments) -> sums`` over one batch ``[B, T]``, jitted when first needed."""
    import jax
    import jax.numpy as jnp

    from lizard_jax.losses import head_error

    def predictions(student: "Llama", teacher: "Llama") -> Callable:
        def of(ours: Any, theirs: Any, targets: Any) -> dict[str, Any]:
            ours, theirs = student.logits(ours), teacher.logits(theirs)
            log_ours, log_theirs = jax.nn.log_softmax(ours), jax.nn.log_softmax(theirs)
            return {
                "kl": (jnp.exp(log_theirs) * (log_theirs - log_ours)).sum(axis=-1),
                "agreement": (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).astype(ours.dtype),
                "student_loss": token_losses(ours, targets),
                "teacher_loss": token_losses(theirs, targets),
            }

        return of

    @jax.jit
    def compare(student: "Llama", teacher: "Llama", inputs: Any, targets: Any, segments: Any) -> dict[str, Any]:
        errors, sizes = [], []
        x = teacher.embed(inputs)
        for theirs, ours in zip(teacher.layers, student.layers, strict=True):
            normed = theirs.attention_norm(x)
            target = theirs.attention.mixer(normed, *theirs.attention.qkv(normed), segment_ids=segments)
            given = normed.astype(student.embed.embedding.dtype)
            heads = ours.attention.mixer(given, *ours.attention.qkv(given), segment_ids=segments)
            errors.append(head_error(heads, target, segments))
            sizes.append(head_error(jnp.zeros_like(target), target, segments))
            x = theirs.after_heads(x, target)
        hidden = student.hidden(inputs, segment_ids=segments)
        each = by_slices(student, predictions(student, teacher), hidden, teacher.norm(x), targets)
        sums = {name: jnp.where(segments != 0, value, 0.0).sum() for name, value in each.items()}
        return sums | {"error": jnp.stack(errors), "size": jnp.stack(sizes)}

    return compare


def measure(
    student: "Llama", teacher: "Llama", documents: Iterable["Int[np.ndarray, ' n']"], *, length: int, batch: int = 8
) -> dict[str, Any]:
    """Layer errors and the distance of predictions, over documents cut into contexts of ``length``.

    Returns:
        ``kl`` (nats), ``agreement`` (0 to 1), ``student_loss``, ``teacher_loss`` (nats a token), ``tokens``, and
        ``layers``: for each ``layer``, ``relative_error`` and ``mse`` of its head outputs.
    """
    import jax.numpy as jnp
    from tqdm import tqdm

    rows = [row for ids in documents for row in texts.contexts(ids, length)]
    tokens = sum(len(row) - 1 for row in rows)
    sums: dict[str, Any] = {}
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        for group in batched(rows, batch):
            inputs, targets, segments = (np.zeros((batch, length), np.int32) for _ in range(3))
            for place, row in enumerate(group):
                inputs[place, : len(row) - 1], targets[place, : len(row) - 1] = row[:-1], row[1:]
                segments[place, : len(row) - 1] = 1
            part = _compare()(student, teacher, jnp.asarray(inputs), jnp.asarray(targets), jnp.asarray(segments))
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + np.asarray(value, np.float64)
            bar.update(int(segments.sum()))
    relative = np.sqrt(sums["error"] / sums["size"])
    layers = [
        {"layer": n, "relative_error": float(relative[n]), "mse": float(error / tokens)}
        for n, error in enumerate(sums["error"])
    ]
    names = ("kl", "agreement", "student_loss", "teacher_loss")
    return {name: float(sums[name] / tokens) for name in names} | {"tokens": tokens, "length": length, "layers": layers}


# --------------------------------------------------------------------------------------------- attention maps


def map_size(student: "Llama") -> int:
    """Tokens of the drawn text: two windows where that is neither too few nor too many."""
    window = student.config.attention.window if student.config.attention is not None else 0
    return min(max(2 * window, MAP_TOKENS[0]), MAP_TOKENS[1])


def map_text(documents: Sequence["Int[np.ndarray, ' n']"], size: int) -> "Int[np.ndarray, ' n']":
    """The start of the first document that is long enough, or of the longest."""
    return next((ids for ids in documents if len(ids) >= size), max(documents, key=len))[:size]


def attention_maps(student: "Llama", teacher: "Llama", ids: "Int[np.ndarray, ' T']") -> list[tuple["Maps", "Maps"]]:
    """The maps of teacher and student, layer by layer, both for the teacher's hidden states."""
    import jax
    import jax.numpy as jnp

    from lizard_jax.eval.maps import layer_maps

    @jax.jit
    def inputs(teacher: "Llama", tokens: Any) -> list[Any]:
        x, seen = teacher.embed(tokens), []
        for block in teacher.layers:
            seen.append(block.attention_norm(x))
            x = block(x)
        return seen

    out = []
    for n, normed in enumerate(inputs(teacher, jnp.asarray(ids[None]))):
        given = normed.astype(student.embed.embedding.dtype)
        out.append((layer_maps(teacher.layers[n].attention, normed), layer_maps(student.layers[n].attention, given)))
    return out


def shares(teacher: "Maps", student: "Maps") -> dict[str, float]:
    """Means over heads and queries: the distance between the maps, and what the student's branches weigh."""
    whole = student.total.sum(axis=-1) + student.meta
    window, gated = student.window.sum(axis=-1) / whole, student.gated.sum(axis=-1) / whole
    meta = student.meta / whole
    apart = np.abs(teacher.total - student.total / whole[..., None]).sum(axis=-1) + np.abs(teacher.meta - meta)
    means = {"map_distance": apart / 2, "window_share": window, "gated_share": gated, "meta_share": meta}
    return {name: float(value.mean()) for name, value in means.items()}


# --------------------------------------------------------------------------------------------- generations


def generations(
    student: "Llama",
    teacher: "Llama",
    prompts: Sequence["Int[np.ndarray, ' n']"],
    tokenizer: Any,
    count: int,
    eos: Sequence[int],
) -> list[dict[str, Any]]:
    """Greedy continuations of each prompt by both: ``prompt``, ``teacher``, ``student``, and ``same``, the number of
    tokens before the first difference."""
    from lizard_jax.generate.engine import Generation
    from lizard_jax.generate.sampling import Sampling

    if not prompts:
        return []
    rows = []
    for model in (teacher, student):
        run = Generation(
            model, tokenizer, [ids.tolist() for ids in prompts], max_new_tokens=count, sampling=Sampling(), eos=eos
        )
        for _ in run.pieces():
            pass
        rows.append(run.rows)
    out = []
    for ids, theirs, ours in zip(prompts, *rows, strict=True):
        pairs = zip(theirs.tokens, ours.tokens, strict=False)
        differs = (n for n, (a, b) in enumerate(pairs) if a != b)
        same = next(differs, min(len(theirs.tokens), len(ours.tokens)))
        prompt = tokenizer.decode(ids, skip_special_tokens=True)
        out.append({"prompt": prompt, "teacher": theirs.text, "student": ours.text, "same": same})
    return out


def side_by_side(found: list[dict[str, Any]]) -> str:
    """The generations as a Markdown page."""
    parts = ["# Greedy continuations of held-out text\n"]
    for number, row in enumerate(found, 1):
        parts.append(f"## {number}: the first {row['same']} tokens are the same\n")
        parts += [f"**{who}**\n\n```text\n{row[who]}\n```\n" for who in ("prompt", "teacher", "student")]
    return "\n".join(parts)


# --------------------------------------------------------------------------------------------- tables and pictures


def show(result: dict[str, Any]) -> None:
    """The tables, on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    layers = Table(title=f"layers, on {result['tokens']:,} tokens; maps on one text")
    names = {
        "relative_error": "relative error", "mse": "MSE", "map_distance": "map distance", "window_share": "window",
        "gated_share": "gated", "meta_share": "meta",
    }  # fmt: skip
    for name in ("layer", *names.values()):
        layers.add_column(name, justify="right")
    for row in result["layers"]:
        cells = [f"{row[name]:.3e}" if name == "mse" else f"{row[name]:.4f}" for name in names]
        layers.add_row(str(row["layer"]), *cells)
    console.print(layers)
    if result["generations"]:
        written = Table(title="greedy continuations", show_lines=True)
        for name in ("prompt", "teacher", "student", "same tokens"):
            written.add_column(name)
        for row in result["generations"]:
            written.add_row(*(Text(row[name]) for name in ("prompt", "teacher", "student")), str(row["same"]))
        # Wrapped in its cells, and so at the width of the terminal.
        Console(highlight=False).print(written)
    console.print(
        f"loss {result['student_loss']:.4f} (teacher {result['teacher_loss']:.4f}) nats a token, "
        f"KL {result['kl']:.6f} nats, top-1 agreement {result['agreement']:.4%}"
    )


def layer_picture(result: dict[str, Any]) -> "Figure":
    """Relative error by layer, and how the student's weight is shared among its branches."""
    from matplotlib.figure import Figure

    rows = result["layers"]
    at = [row["layer"] for row in rows]
    figure = Figure(figsize=(10, 4), layout="constrained")
    error, share = figure.subplots(1, 2)
    error.bar(at, [row["relative_error"] for row in rows])
    error.set(title="relative error of head outputs", xlabel="layer")
    below = np.zeros(len(rows))
    for name in ("window", "gated", "meta"):
        height = np.array([row[f"{name}_share"] for row in rows])
        share.bar(at, height, bottom=below, label=name)
        below += height
    share.set(title="share of the student's attention", xlabel="layer", ylim=(0, 1))
    share.legend(loc="lower right")
    return figure


def picture(teacher: "Maps", student: "Maps", heads: int, layer: int) -> "Figure":
    """The first ``heads`` heads of one layer, a row each: teacher, student, and the student's parts."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    heads = min(heads, len(teacher.window))
    figure = Figure(figsize=(12, 2.6 * heads + 0.6), layout="constrained")
    axes = figure.subplots(heads, 5, squeeze=False, width_ratios=[1, 1, 1, 1, 0.12])
    scale = LogNorm(FAINTEST, 1.0)
    columns = ("teacher", "student = window + gated + meta", "window", "gated", "meta")
    for n in range(heads):
        parts = (
            teacher.total[n], student.total[n], student.window[n], student.gated[n], student.meta[n][:, None]
        )  # fmt: skip
        image = None
        for axis, part, name in zip(axes[n], parts, columns, strict=True):
            aspect = "auto" if name == "meta" else "equal"
            seen = np.ma.masked_less(part, FAINTEST)
            image = axis.imshow(seen, norm=scale, cmap="magma_r", aspect=aspect, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if n == 0:
                axis.set_title(name, fontsize="medium")
        axes[n, 0].set_ylabel(f"head {n}\nquery")
        assert image is not None
        figure.colorbar(image, ax=axes[n, -1], fraction=1.0)
    for axis in axes[-1, :4]:
        axis.set_xlabel("key")
    figure.suptitle(f"attention of layer {layer}, the teacher's hidden states given to both")
    return figure
