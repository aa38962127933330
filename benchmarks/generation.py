"""What a token costs after a long context: the linearized model beside its teacher with a key/value cache.

    uv run benchmarks/generation.py --teacher DIR --student DIR --other DIR
    uv run benchmarks/generation.py --student DIR --long 200000

First form: contexts of 1k and up, for 1 and for 16 rows. A context of random tokens is read in chunks, once, by what
was compiled before; then its state stands for every row, and tokens are drawn in blocks of 32 from all contexts in
turn, so that the machine's moods fall on all alike; medians. The teacher's cache holds the context and what is written,
up to the next 512, and the teacher stops at ``--teacher-limit``. Memory is that of the state: the student's is fixed, a
cache holds every token. ``--other`` is one more student, of other settings.

Second form: that many tokens in one go, from a prompt of one token. Times by position, and the bytes of all arrays that
live on the device, which must not change.

Prints tables, and writes ``generation.json`` and ``generation.png``, ``generation_long.*`` for the second form.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm import tqdm

import lizard_jax
from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError
from lizard_jax.generate import decode
from lizard_jax.generate.engine import live_bytes
from lizard_jax.generate.sampling import Sampling
from lizard_jax.train.report import versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from lizard_jax.models.llama import Llama

HERE = Path(__file__).resolve().parent
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 100_000)
SAMPLING = Sampling(temperature=1.0)
"""Draws, so that the text does not run into a loop; no token ends it."""


def size_of(state: Any) -> int:
    """Bytes of a state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def timed_blocks(carry: decode.Carry, model: Llama, blocks: int) -> tuple[decode.Carry, float]:
    """Seconds for each block of tokens of every row."""
    began = time.perf_counter()
    for _ in range(blocks):
        _, carry = decode.write(model, carry, decode.BLOCK, SAMPLING)
    return carry, (time.perf_counter() - began) / blocks


def read_context(model: Llama, length: int, new: int) -> tuple[Any, float]:
    """Logits and state of one row after a context of random tokens, and the seconds its prefill took."""
    tokens = np.random.default_rng(length).integers(0, model.config.vocab_size, length).tolist()
    size = decode.capacity([length], new)
    for width in {width for _, width in decode.chunks([length], decode.PREFILL)}:  # compiles
        jax.block_until_ready(decode.prefill(model, [tokens[:width]], model.init_state(1, size)))
    state = model.init_state(1, size)
    began = time.perf_counter()
    read = jax.block_until_ready(decode.prefill(model, [tokens], state))
    return read, time.perf_counter() - began


def rows_of(read: Any, batch: int) -> decode.Carry:
    """A carry of ``batch`` rows that have all read the same."""
    logits, state = jax.tree.map(lambda leaf: leaf.repeat(batch, axis=0), read)
    return decode.start(logits, state, [[0]] * batch, SAMPLING)


def measure(models: Mapping[str, Llama], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per model, batch and context: ``state_bytes``, ``prefill_seconds`` (of one row), ``step_seconds``."""
    new = decode.BLOCK * (args.rounds * args.blocks + 1) + 1
    pairs = [
        (name, context)
        for name in models
        for context in sorted(args.contexts)
        if name != "teacher" or context <= args.teacher_limit
    ]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(pairs) * (1 + len(args.batches) * (1 + args.rounds)), unit=" runs", disable=None) as bar:
        read: dict[tuple[str, int], tuple[Any, float]] = {}
        for name, context in pairs:
            bar.set_postfix(reading=f"{name}, {context:,}")
            read[name, context] = read_context(models[name], context, new)
            bar.update()
        for batch in args.batches:
            carries: dict[tuple[str, int], decode.Carry] = {}
            seconds: dict[tuple[str, int], list[float]] = {pair: [] for pair in pairs}
            for turn in range(1 + args.rounds):
                for name, context in pairs:
                    bar.set_postfix(writing=f"{name}, {batch} x {context:,}")
                    if turn == 0:  # compiles
                        carries[name, context] = rows_of(read[name, context][0], batch)
                    carry, each = timed_blocks(carries[name, context], models[name], args.blocks if turn else 1)
                    carries[name, context] = carry
                    if turn:
                        seconds[name, context].append(each / decode.BLOCK)
                    bar.update()
            rows += [
                {
                    "model": name, "batch": batch, "context": context,
                    "state_bytes": size_of(carries[name, context].state),
                    "prefill_seconds": read[name, context][1], "step_seconds": float(np.median(times)),
                    "step_seconds_all": times,
                }
                for (name, context), times in seconds.items()
            ]  # fmt: skip
    return rows


def long_run(model: Llama, count: int, bucket: int) -> dict[str, Any]:
    """``count`` tokens from one: seconds a token by position, and the live bytes seen at the end of every block."""
    carry = rows_of(read_context(model, 1, 1)[0], 1)
    carry, _ = timed_blocks(carry, model, 1)  # compiles
    written, part, held, rows = decode.BLOCK + 1, [], [], []
    with tqdm(total=count, initial=written, unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        while written < count:
            carry, each = timed_blocks(carry, model, 1)
            written += decode.BLOCK
            part.append(each / decode.BLOCK)
            held.append(live_bytes())
            bar.update(decode.BLOCK)
            if written // bucket > len(rows) or written >= count:
                rows.append({"position": written, "step_seconds": float(np.median(part))})
                part = []
    finite = all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(carry.state))
    return {
        "tokens": written, "state_bytes": size_of(carry.state), "live_bytes_least": min(held),
        "live_bytes_most": max(held), "finite": finite, "rows": rows,
    }  # fmt: skip


def kib(number: int) -> str:
    return f"{number / 1024:,.0f} KiB"


def table(rows: list[dict[str, Any]]) -> str:
    """By batch and context: tokens a second that all rows write together and that one row reads of its context, each
    with the student's speed over this one's, and memory."""
    lines = []
    for batch in sorted({row["batch"] for row in rows}):
        lines += [
            f"| batch {batch}, context | | writes, tokens/s | student's over it | reads, tokens/s | student's over it "
            "| cache or state |",
            "|---:|---|---:|---:|---:|---:|---:|",
        ]
        for context in sorted({row["context"] for row in rows if row["batch"] == batch}):
            here = [row for row in rows if (row["batch"], row["context"]) == (batch, context)]
            ours = next(row for row in here if row["model"] == "student")
            lines += [
                f"| {context:,} | {row['model']} | {batch / row['step_seconds']:,.0f} "
                f"| {row['step_seconds'] / ours['step_seconds']:.2f} | {context / row['prefill_seconds']:,.0f} "
                f"| {row['prefill_seconds'] / ours['prefill_seconds']:.2f} | {kib(row['state_bytes'])} |"
                for row in here
            ]
        lines.append("")
    return "\n".join(lines)


def flatness(rows: list[dict[str, Any]]) -> list[str]:
    """What the student's step costs at its longest context over its shortest: the median over turns."""
    out = []
    for batch in sorted({row["batch"] for row in rows}):
        own = sorted(
            (r for r in rows if r["model"] == "student" and r["batch"] == batch), key=lambda row: row["context"]
        )
        if len(own) > 1:
            turns = zip(own[-1]["step_seconds_all"], own[0]["step_seconds_all"], strict=True)
            ratio = float(np.median([late / early for late, early in turns]))
            out.append(
                f"student, batch {batch}: a step at {own[-1]['context']:,} costs {ratio:.3f} of one at "
                f"{own[0]['context']:,}"
            )
    return out


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Tokens a second and memory against the context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for name, colour in (("teacher", "tab:gray"), ("student", "tab:green"), ("other", "tab:blue")):
        for batch, style in zip(sorted({row["batch"] for row in rows}), ("-", "--", ":", "-."), strict=False):
            own = [row for row in rows if row["model"] == name and row["batch"] == batch]
            if not own:
                continue
            at = [row["context"] for row in own]
            label = {"color": colour, "linestyle": style, "marker": "o", "label": f"{name}, batch {batch}"}
            speed.plot(at, [batch / row["step_seconds"] for row in own], **label)
            memory.plot(at, [row["state_bytes"] / 2**20 for row in own], **label)
    speed.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="tokens/s", title="decoding")
    memory.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="MiB", title="cache or state")
    for panel in (speed, memory):
        panel.grid(alpha=0.3)
        panel.legend()
    return figure


def long_picture(result: dict[str, Any]) -> Figure:
    """Microseconds a token against the position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    at = [row["position"] for row in result["rows"]]
    panel.plot(at, [1e6 * row["step_seconds"] for row in result["rows"]])
    panel.set(xlabel="position", ylabel="microseconds a token", ylim=(0, None), title="one text, one state")
    panel.grid(alpha=0.3)
    return figure


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, metavar="DIR", help="linearized checkpoint")
    parser.add_argument("--teacher", metavar="DIR", help="what it came from; left out, the student is measured alone")
    parser.add_argument("--other", metavar="DIR", help="one more student beside it")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens (default %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="rows (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each case (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of 32 tokens a turn (default %(default)s)")
    parser.add_argument(
        "--teacher-limit", type=int, default=16384, help="longest context of the teacher (default %(default)s)"
    )
    parser.add_argument("--long", type=int, metavar="N", help="instead: N tokens of the student in one go")
    parser.add_argument("--bucket", type=int, default=1000, help="positions told together (default %(default)s)")
    parser.add_argument("--name", help="of the results' files (default: generation, with --long generation_long)")
    parser.add_argument("--out", type=Path, default=HERE, help="directory of the results (default: beside this file)")
    return parser


def main() -> int:
    args = arguments().parse_args()
    numbers = {name: getattr(args, name) for name in ("rounds", "blocks", "bucket", "teacher_limit")}
    numbers |= {"contexts": min(args.contexts), "batches": min(args.batches)}
    numbers |= {} if args.long is None else {"long": args.long}
    try:
        for name, value in numbers.items():
            if value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, must be at least 1")
        paths = {"teacher": args.teacher, "student": args.student, "other": args.other}
        models = {name: lizard_jax.load(path) for name, path in paths.items() if path is not None}
        args.out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any]
    name = args.name or ("generation" if args.long is None else "generation_long")
    if args.long is not None:
        result = long_run(models["student"], args.long, args.bucket)
        early, late = result["rows"][0], result["rows"][-1]
        near = min(result["rows"], key=lambda row: abs(row["position"] - 100_000))
        for row in dict.fromkeys((early["position"], near["position"], late["position"])):
            step = next(r["step_seconds"] for r in result["rows"] if r["position"] == row)
            print(f"up to position {row:,}: {1e6 * step:.1f} microseconds a token")
        print(
            f"{result['tokens']:,} tokens in one go; state {result['state_bytes']:,} bytes; live arrays "
            f"{result['live_bytes_least']:,} to {result['live_bytes_most']:,} bytes"
        )
        drawn = long_picture(result)
    else:
        rows = measure(models, args)
        result, drawn = {"rows": rows, "notes": flatness(rows)}, picture(rows)
        print(table(rows))
        print("\n".join(result["notes"]))
        write_atomic(args.out / f"{name}.md", table(rows) + "\n".join(["", *result["notes"], ""]))
    result |= {
        "settings": {key: getattr(args, key) for key in ("contexts", "batches", "rounds", "blocks", "long", "bucket")},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "cores": os.cpu_count(),
        "versions": versions(),
    }  # fmt: skip
    png = io.BytesIO()
    drawn.savefig(png, format="png", dpi=110)
    write_atomic(args.out / f"{name}.png", png.getvalue())
    write_atomic(args.out / f"{name}.json", json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
