"""Measure what each of a teacher's key heads needs of its far past, and write it down for train.py.

python -m lizard_jax.select TEACHER --out runs/heads
python -m lizard_jax.select TEACHER --by loss --data text.txt --out runs/heads
python train.py --heads runs/heads/heads.json:10% …
python -m lizard_jax.select TEACHER --by error --data text.txt --out runs/needs
python train.py --state-bytes 16MiB --curves runs/needs/budgets.json …

By retrieval (the default), a head's score is its attention from the answer to a question about a long text to the place
where the answer is hidden, in texts made for any tokenizer. By loss, it is what the predictions on --data lose (KL)
where that head alone sees its window. Each takes minutes and trains nothing. What the best heads keep, the others cut
to the window, is then scored on other texts, for several numbers of heads.

By error, what each head loses with so many kept pairs beside its window is measured on half of --data, and budgets of
several sizes, split among the heads by it, are scored on the other half.

The last line of the output is ``heads=FILE`` or ``curves=FILE``, or without --out the names of the best tenth.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lizard_jax.errors import UserError
from lizard_jax.program import ended, program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.0, 0.05, 0.1, 0.2, 1.0)
"""Of the key heads: how many keep everything in the rows of the table."""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program("python -m lizard_jax.select"), description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("teacher", metavar="TEACHER", help="HF directory or hub id")
    parser.add_argument("--by", choices=("retrieval", "loss", "error"), default="retrieval", help="default %(default)s")
    parser.add_argument("--window", type=int, default=128, help="of the heads that are cut (default %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a text (default %(default)s)")
    parser.add_argument("--samples", type=int, default=8, help="texts to rank by (default %(default)s)")
    parser.add_argument("--scored", type=int, default=8, help="texts to score by (default %(default)s)")
    parser.add_argument("--filler", metavar="FILE", help="a text whose sentences hide answers (default: our own prose)")
    parser.add_argument("--data", metavar="PATH", help="plain text on which the loss is measured, or 'embedded'")
    parser.add_argument("--separator", default="<|endoftext|>", help="of its documents (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts that are made (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as stored)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="write heads.json (or budgets.json), result.json and a picture there"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Ranks, scores, prints the table, and writes what ``--out`` asks for.

    Raises:
        UserError: a number out of range, no such teacher or text, or a text too short.
    """
    for name in ("window", "length", "samples", "scored"):
        if not 1 <= getattr(args, name) <= 2**24:
            raise UserError(f"--{name} is {getattr(args, name)}, must be at least 1 and at most {2**24}")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}, must be at least 0 and below {2**32}")
    if args.length <= args.window:
        raise UserError(f"--length {args.length} never leaves the window of {args.window}; give a longer one")
    if args.by != "retrieval" and args.data is None:
        raise UserError(f"--by {args.by} needs --data, the text that it is measured on")
    out_dir = None if args.out is None else Path(args.out).expanduser()
    if out_dir is not None:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {out_dir}: {error.strerror or error}") from None
    if args.by == "error":
        from lizard_jax.select import needs

        needs.run(args, out_dir)
        return
    found = rank(args)
    show(found)
    if out_dir is not None:
        write(out_dir, args, found)
        print(f"heads={out_dir / 'heads.json'}")
    else:
        print(",".join(found["ranking"].names[: max(1, round(0.1 * len(found["ranking"].names)))]))


def rank(args: argparse.Namespace) -> dict[str, Any]:
    """The ranking, and a row for each number of heads that is scored."""
    import numpy as np
    from tqdm import tqdm

    from lizard_jax.convert.files import teacher_dir
    from lizard_jax.convert.load import load_hf
    from lizard_jax.data.haystack import Measure, filler
    from lizard_jax.data.text import load_tokenizer
    from lizard_jax.select import choice, rank
    from lizard_jax.select.needles import make
    from lizard_jax.select.needs import texts

    source = teacher_dir(args.teacher)
    tokenizer = load_tokenizer(source)
    measure = Measure(tokenizer, filler(args.filler))
    # Other random numbers, other texts: those that rank never score.
    ranked = make(measure, args.length, args.samples, seed=2 * args.seed)
    scored = make(measure, args.length, args.scored, seed=2 * args.seed + 1)
    plain = [] if args.data is None else texts(args.data, args.separator, measure, args.length, 2 * args.samples)
    model = load_hf(source, dtype=args.dtype)
    config = model.config
    if config.attention is not None:
        raise UserError(f"{args.teacher} is linearized already; give the teacher that it came from")
    heads = config.num_layers * config.kv_heads
    half = len(plain) // 2 if args.by == "loss" else 0
    total = half * heads if args.by == "loss" else len(ranked.tokens)
    with tqdm(total=total, desc="ranking", unit=" heads" if half else " texts", disable=None, leave=False) as bar:
        if args.by == "loss":
            scores = rank.cut_losses(model, plain[:half], window=args.window, tick=bar.update)
        else:
            scores = rank.retrieval_scores(model, ranked, tick=bar.update)
    ranking, rows = choice.ranking(args.by, scores), []
    numbers = sorted({round(share * heads) for share in SHARES})
    plain = plain[half:] if half else plain
    each = len(scored.tokens) + len(plain)
    with tqdm(total=len(numbers) * each, desc="scoring", unit=" texts", disable=None, leave=False) as bar:
        for number in numbers:
            keep = np.zeros((config.num_layers, config.kv_heads), np.bool_)
            for name in ranking.names[:number]:
                layer, head = map(int, name.split("."))
                keep[layer, head] = True
            kept = rank.score(model, keep, scored, plain, window=args.window, tick=bar.update)
            tokens = number * args.length + (heads - number) * min(args.length, args.window + 4)
            rows.append({"heads": number, "cache": tokens / (heads * args.length), **vars(kept)})
    return {"ranking": ranking, "rows": rows, "scores": scores, "heads": heads}


def show(found: dict[str, Any]) -> None:
    """The table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"the best heads by {found['ranking'].by} keep everything, the others the window; no training")
    for name in ("key heads", "of all", "of the cache", "needles", "answer, nats", "loss, nats"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        table.add_row(
            str(row["heads"]), f"{row['heads'] / found['heads']:.0%}", f"{row['cache']:.0%}", f"{row['needles']:.2f}",
            f"{row['answer_loss']:.3f}", loss,
        )  # fmt: skip
    Console(highlight=False, soft_wrap=True).print(table)


def write(out_dir: Path, args: argparse.Namespace, found: dict[str, Any]) -> None:
    """``heads.png``, ``result.json``, and last ``heads.json``."""
    import io
    import json

    from lizard_jax.atomic import write_atomic
    from lizard_jax.select import choice

    png = io.BytesIO()
    picture(found).savefig(png, format="png", dpi=110)
    write_atomic(out_dir / "heads.png", png.getvalue())
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    write_atomic(out_dir / "result.json", json.dumps({"rows": found["rows"], "settings": settings}, indent=1) + "\n")
    write_atomic(out_dir / "heads.json", choice.text(found["ranking"]))


def picture(found: dict[str, Any]) -> "Figure":
    """Every head's score as a map, and what the best keep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    scores, kept = figure.subplots(1, 2)
    image = scores.imshow(found["scores"].T, cmap="magma_r", aspect="auto", interpolation="nearest")
    scores.set(title=f"score by {found['ranking'].by}", xlabel="layer", ylabel="key head")
    scores.set_yticks(range(found["scores"].shape[1]))
    figure.colorbar(image, ax=scores)
    rows = found["rows"]
    share = [100 * row["cache"] for row in rows]
    kept.plot(share, [row["answer_loss"] for row in rows], "o-", label="answers")
    if rows[0]["loss"] is not None:
        kept.plot(share, [row["loss"] for row in rows], "s-", label="text behind the window")
    kept.set(title="what the best heads keep", xlabel="% of the teacher's cache", ylabel="nats a token", xscale="log")
    kept.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    def work() -> int:
        run(arguments().parse_args(argv))
        return 0

    return ended(work, interrupted="interrupted; no ranking was written")


if __name__ == "__main__":
    sys.exit(main())
