"""Passkey retrieval: five passkeys at random places of a long text, and a question for one of them.

python -m lizard_jax.eval passkey CKPT --lengths 512 1024 2048 4096 --out results
python -m lizard_jax.eval passkey CKPT --lengths 1024 --write passkeys.jsonl

An example has exactly the given number of tokens, with what the tokenizer puts in front, answer and EOS included, and
depends on the seed and its number alone. The passkey that is asked for lies in one part of the text after the other,
so that each cell of length and depth is asked for equally often. An answer counts if the first word of the greedy
continuation is the passkey and nothing but it; with --teacher-forced, if each of its tokens is the likeliest.

--write makes records to train stage 2 on instead (``train.py --stage=2 --data=FILE --answer-only``), which have nothing
in common with those of the evaluation. Set --sequence-length to --lengths, and each record fills a sequence.

The last line of the output is ``accuracy=… examples=…``.
"""

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lizard_jax.errors import UserError
from lizard_jax.eval import _checkpoint, results, retrieval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lizard_jax.data.passkey import PasskeySet
    from lizard_jax.models.llama import Llama

NAME = "passkey"
HELP = "passkeys hidden in a long text: exact match by length and depth; writes training records too"

SAMPLES, RECORDS = 5, 10_000
SHOWN = 20
"""Examples that result.json shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this evaluation."""
    retrieval.add_arguments(
        parser, lengths=(512, 1024, 2048, 4096),
        samples=f"examples for each length and depth (default {SAMPLES}); with --write records in all "
        f"(default {RECORDS})",
    )  # fmt: skip
    parser.add_argument("--depths", type=int, default=10, help="parts of the text to tell apart (default %(default)s)")
    parser.add_argument("--keys", type=int, default=5, help="passkeys in a text (default %(default)s)")
    parser.add_argument(
        "--key-tokens", default="5-8", metavar="A-B", help="fewest and most tokens of a passkey (default %(default)s)"
    )
    parser.add_argument("--write", metavar="FILE", help="write records to train on there (JSONL), and measure nothing")


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table, and writes what ``--out`` asks for; or writes training records.

    Raises:
        UserError: a number out of range, a length that cannot hold the passkeys, or no model.
    """
    from lizard_jax.data.haystack import Measure, filler
    from lizard_jax.data.passkey import PasskeySet
    from lizard_jax.data.text import load_tokenizer

    retrieval.check(args, "depths", "keys")
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", args.key_tokens)
    if not match:
        raise UserError(f"--key-tokens is {args.key_tokens!r}; give a number or two such as 5-8")
    key_tokens = int(match[1]), int(match[2] or match[1])
    if args.write and args.form != "alpaca":
        raise UserError(f"--write makes Alpaca records; leave out --form {args.form}")
    out_dir = results.prepare(args.out) if not args.write else None
    tokenizer = load_tokenizer(_checkpoint.tokenizer_source(args))
    ruler = Measure(tokenizer, filler(args.filler))
    sets = [
        PasskeySet(ruler, length, args.keys, key_tokens, args.form, args.seed, bool(args.write), args.depths)
        for length in args.lengths
    ]
    for examples in sets:
        examples[0]  # A length that cannot be made is told before anything slow begins.
    if args.write:
        write(Path(args.write).expanduser(), sets, args.samples or RECORDS)
        return

    from lizard_jax.generate.prompts import end_tokens

    model = _checkpoint.load(args)
    result = measure(
        model, sets, samples=args.samples or SAMPLES, batch=args.batch, eos=end_tokens(model.source, tokenizer),
        teacher_forced=args.teacher_forced,
    )  # fmt: skip
    show(result)
    if out_dir is not None:
        results.write(out_dir, args, result, {"passkey.png": picture(result)})
    print(f"accuracy={result['accuracy']:.6f} examples={result['examples']}")


def write(file: Path, sets: "list[PasskeySet]", count: int) -> None:
    """Writes training records, the whole file or nothing.

    Raises:
        UserError: it cannot be written.
    """
    from tqdm import tqdm

    from lizard_jax.data.passkey import training_lines

    name = None
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.writelines(tqdm(training_lines(sets, count), total=count, unit=" records", disable=None, leave=False))
        os.chmod(name, 0o644)
        os.replace(name, file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)
    retrieval.note(f"{count:,} records of {', '.join(str(examples.length) for examples in sets)} tokens in {file}")


def correct(continuation: str, answer: str) -> bool:
    """Whether the first word is the passkey and nothing but it; what comes after it does not matter."""
    word = re.match(r"\s*(\w+)", continuation)
    return word is not None and word[1] == answer


def measure(
    model: "Llama",
    sets: "list[PasskeySet]",
    *,
    samples: int,
    batch: int = 8,
    eos: tuple[int, ...] = (),
    teacher_forced: bool = False,
) -> dict[str, Any]:
    """Exact match of every length and depth.

    Args:
        teacher_forced: judge by the likeliest tokens behind the true ones, and write nothing.

    Returns:
        ``accuracy``, ``examples`` (how many), ``cells`` (a list of ``length``, ``depth`` (from, to), ``accuracy``,
        ``samples``, ``mean_depth`` (where in the prompt the passkeys stood)), and ``shown`` (some examples: ``length``,
        ``depth``, ``keys``, ``answer``, ``right``, and ``continuation`` where one was written).
    """
    from tqdm import tqdm

    cells, shown = [], []
    total = sum(examples.depths * samples for examples in sets)
    with tqdm(total=total, unit=" examples", disable=None, leave=False) as bar:
        for examples in sets:
            bar.set_postfix(length=examples.length)
            ruler = examples.measure
            made = [examples[index] for index in range(examples.depths * samples)]
            prompts = [ruler.prompt(example.prompt) for example in made]
            retrieval.fits(model.config.vocab_size, prompts)
            written: list[dict[str, str]] = [{}] * len(made)
            if teacher_forced:
                documents, answers = [one.document for one in made], [[one.answer] for one in made]
                shares = retrieval.likeliest(model, ruler, documents, answers, batch=batch, tick=bar.update)
                right = [share == 1.0 for share in shares]
            else:
                # Two more than the answer takes, so that one which goes on is seen to.
                new = [ruler.length(one.document) - len(ids) + 2 for one, ids in zip(made, prompts, strict=True)]
                texts = retrieval.continuations(
                    model, ruler.tokenizer, prompts, new, eos=eos, batch=batch, tick=bar.update
                )
                right = [correct(text, example.answer) for text, example in zip(texts, made, strict=True)]
                written = [{"continuation": text} for text in texts]
            for part in range(examples.depths):
                own = slice(part, None, examples.depths)
                cells.append(
                    {
                        "length": examples.length,
                        "depth": [part / examples.depths, (part + 1) / examples.depths],
                        "accuracy": sum(right[own]) / samples,
                        "samples": samples,
                        "mean_depth": sum(example.depth for example in made[own]) / samples,
                    }
                )
            shown += [
                {
                    "length": examples.length, "depth": example.depth, "keys": list(example.keys),
                    "answer": example.answer, "right": bool(good), **more,
                }
                for example, good, more in zip(made[: -(-SHOWN // len(sets))], right, written, strict=False)
            ]  # fmt: skip
    accuracy = sum(cell["accuracy"] for cell in cells) / len(cells)
    return {"accuracy": accuracy, "examples": total, "cells": cells, "shown": shown}


def grid(result: dict[str, Any]) -> tuple[list[int], list[str], list[list[float]]]:
    """Lengths, depths by name, and accuracy as rows of depth."""
    lengths = sorted({cell["length"] for cell in result["cells"]})
    depths = sorted({tuple(cell["depth"]) for cell in result["cells"]})
    found = {(cell["length"], tuple(cell["depth"])): cell["accuracy"] for cell in result["cells"]}
    names = [f"{100 * low:.0f}-{100 * high:.0f}%" for low, high in depths]
    return lengths, names, [[found[length, depth] for length in lengths] for depth in depths]


def show(result: dict[str, Any]) -> None:
    """The table, on stdout."""
    lengths, names, values = grid(result)
    mean = [sum(column) / len(column) for column in zip(*values, strict=True)]
    rows = [*zip(names, values, strict=True), ("all", mean)]
    columns = [f"{length:,}" for length in lengths]
    retrieval.show("passkeys found, by depth and tokens of the text", rows, columns, "depth")


def picture(result: dict[str, Any]) -> "Figure":
    """The heat map: length across, depth down."""
    lengths, names, values = grid(result)
    return retrieval.heat_map(
        values, rows=names, columns=[f"{length:,}" for length in lengths],
        title=f"passkeys found: {result['accuracy']:.3f}", axes="tokens, depth of the passkey",
    )  # fmt: skip
