"""Whether the way a text is read changes what is written: greedy, token for token, over many prompts.

    uv run benchmarks/same_text.py CKPT --data text.txt
    uv run benchmarks/same_text.py CKPT                      # prompts of random tokens

Every prompt is continued alone after one prefill. Then the same again in batches of unequal length; with the prompt
read in small chunks (two sizes); and cut in two by a saved state, written to a file and loaded. A text that differs
counts as a near-tie where the full forward pass sees less than ``--tie`` between the logits of both tokens at the first
difference, and every such place is shown; otherwise it counts as different. Prints a table, writes
``same_text.json`` (a list, one entry a checkpoint's folder name), and exits 1 if a text is different.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import lizard_jax
from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError
from lizard_jax.eval import texts
from lizard_jax.generate import conversation, decode
from lizard_jax.generate.engine import Generation
from lizard_jax.generate.prompts import text_tokenizer
from lizard_jax.generate.sampling import Sampling
from lizard_jax.train.report import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lizard_jax.models.llama import Llama

HERE = Path(__file__).resolve().parent
GREEDY = Sampling()
BATCH = 20
CHUNKS = (7, 64)


def draw_prompts(model: Llama, args: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Prompts of 1 to ``--longest`` tokens, from anywhere in the text, or of random tokens."""
    rng = np.random.default_rng(args.seed)
    lengths = rng.integers(1, args.longest + 1, args.prompts)
    vocabulary = model.config.vocab_size
    if args.data is None:
        return [rng.integers(0, vocabulary, n).tolist() for n in lengths]
    documents = texts.read(args.data, tokenizer, vocab_size=vocabulary, separator=args.separator)
    stream = np.concatenate([document.ids for document in itertools.islice(documents, 2000)])
    if len(stream) <= args.longest:
        raise UserError(f"{args.data} holds {len(stream)} tokens, too few for prompts of {args.longest}")
    starts = rng.integers(0, len(stream) - args.longest, args.prompts)
    return [stream[at : at + n].tolist() for at, n in zip(starts, lengths, strict=True)]


def greedy(model: Llama, prompts: Sequence[list[int]], new: int, size: int) -> list[list[int]]:
    """``new`` tokens behind each prompt of a batch, read ``size`` tokens at a time."""
    capacity = decode.capacity([len(prompt) for prompt in prompts], new)
    logits, state = decode.prefill(model, prompts, model.init_state(len(prompts), capacity), size=size)
    carry = decode.start(logits, state, prompts, GREEDY)
    blocks = [np.asarray(carry.token)[None]]
    while (left := new - sum(map(len, blocks))) > 0:
        block, carry = decode.write(model, carry, min(left, decode.BLOCK), GREEDY)
        blocks.append(block)
    return np.concatenate(blocks).T.tolist()


def through_a_file(model: Llama, tokenizer: Any, prompt: list[int], new: int, folder: Path) -> list[int]:
    """``new`` tokens, after the first half of which the state is saved, and loaded again."""
    file = folder / "state"
    written: list[int] = []
    earlier = None
    for count in (new // 2, new - new // 2):
        run = Generation(
            model, tokenizer, [[]] if earlier else [prompt], max_new_tokens=count, sampling=GREEDY, earlier=earlier
        )
        for _ in run.pieces():
            pass
        written += run.rows[0].tokens
        conversation.save(file, run.conversation(), model)
        earlier = conversation.load(file, model)
    return written


@jax.jit
def _full(model: Llama, tokens: Any) -> Any:
    return model(tokens)


def gap(model: Llama, prompt: list[int], one: list[int], other: list[int], width: int) -> tuple[int, float]:
    """Where two continuations part, and how far apart the full pass sees the logits of both tokens there."""
    at = next(n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    context = [*prompt, *one[:at]]
    logits = _full(model, jnp.asarray([context + [0] * (width - len(context))], jnp.int32))[0, len(context) - 1]
    return at, abs(float(logits[one[at]] - logits[other[at]]))


def ways(model: Llama, tokenizer: Any, new: int, folder: Path) -> dict[str, Callable[[list[list[int]]], list[Any]]]:
    """By name, functions from prompts to continuations."""

    def batches(prompts):
        return [row for group in itertools.batched(prompts, BATCH) for row in greedy(model, group, new, decode.PREFILL)]

    def alone(prompts, size=decode.PREFILL):
        return [greedy(model, [prompt], new, size)[0] for prompt in tqdm(prompts, disable=None, leave=False)]

    def saved(prompts):
        return [through_a_file(model, tokenizer, p, new, folder) for p in tqdm(prompts, disable=None, leave=False)]

    chunked = {f"read {size} at a time": functools.partial(alone, size=size) for size in CHUNKS}
    return {"alone": alone, f"in batches of {BATCH}": batches} | chunked | {"saved and loaded half-way": saved}


def measure(model: Llama, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """For every way: how many texts are identical, near-ties and different, and where the near-ties are."""
    prompts = draw_prompts(model, args, tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        found = ways(model, tokenizer, args.new_tokens, Path(folder))
        expected = found.pop("alone")(prompts)
        for name, way in found.items():
            row: dict[str, Any] = {"way": name, "identical": 0, "near_ties": [], "different": []}
            for number, (prompt, one, other) in enumerate(zip(prompts, expected, way(prompts), strict=True)):
                if one == other:
                    row["identical"] += 1
                    continue
                at, apart = gap(model, prompt, one, other, args.longest + args.new_tokens)
                place = {"prompt": number, "token": at, "logits_apart": apart}
                row["near_ties" if apart < args.tie else "different"].append(place)
            rows.append(row)
    tokens = sum(map(len, expected))
    return {"prompts": len(prompts), "longest": max(map(len, prompts)), "tokens_written": tokens, "ways": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CKPT", help="teacher or linearized")
    parser.add_argument("--data", metavar="PATH", help="text that prompts are cut from (default: random tokens)")
    parser.add_argument("--separator", default="<|endoftext|>", help="what splits plain text (default %(default)s)")
    parser.add_argument("--prompts", type=int, default=100, help="how many (default %(default)s)")
    parser.add_argument("--longest", type=int, default=200, help="tokens of a prompt at most (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=100, help="written behind each (default %(default)s)")
    parser.add_argument("--tie", type=float, default=1e-5, help="logits nearer than this are a tie (default 1e-5)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "same_text.json", help="results (default %(default)s)")
    args = parser.parse_args()
    try:
        for name, least in (("prompts", 1), ("longest", 1), ("new_tokens", 2)):
            if getattr(args, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be at least {least}")
        model = lizard_jax.load(args.checkpoint, dtype="float32")
        result = measure(model, text_tokenizer(model.source), args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{result['prompts']} prompts, {result['tokens_written']:,} tokens written, against each alone in one prefill"
    )
    print("| | identical | near-ties | different |\n|---|---:|---:|---:|")
    for row in result["ways"]:
        print(f"| {row['way']} | {row['identical']} | {len(row['near_ties'])} | {len(row['different'])} |")
    for row in result["ways"]:
        for kind in ("near_ties", "different"):
            for place in row[kind]:
                print(
                    f"{row['way']}: prompt {place['prompt']}, token {place['token']}: logits "
                    f"{place['logits_apart']:.1e} apart{'' if kind == 'near_ties' else ', DIFFERENT'}"
                )
    linear = model.config.attention is not None
    entry = {"model": "student" if linear else "teacher", "cores": os.cpu_count()} | result
    entry |= {"seed": args.seed, "tie": args.tie, "new_tokens": args.new_tokens, "versions": versions()}
    entry["checkpoint"] = Path(args.checkpoint).name
    known = json.loads(args.out.read_text()) if args.out.is_file() else []
    same = (entry["model"], entry["checkpoint"])
    kept = [other for other in known if (other["model"], other["checkpoint"]) != same]
    write_atomic(args.out, json.dumps([*kept, entry], indent=2) + "\n")
    return int(any(row["different"] for row in result["ways"]))


if __name__ == "__main__":
    sys.exit(main())
