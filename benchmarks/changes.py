"""What each of the recipe's choices is worth alone, on a real teacher: one row a choice, taken back.

    uv run --extra gguf benchmarks/smollm2.py runs/smollm2
    uv run benchmarks/changes.py --teacher runs/smollm2 --train books.txt alpaca.json --score wikitext.txt

Every student has the recipe's window, a quarter of the features and exact pairs as many as each key head needs, in the
bytes of a plain window of 258 tokens; one thing is other than in the recipe. Each is scored before training and after
stage 1, and the recipe itself also after stage 2, with the KL's share as it is and others. Budget, data order and
learning rates are the same for all, and the weights are those of the last step. Loss is by position, as in
``recovery.py``, whose stages, scores and texts these are; beside it what training's own validation found at the end, on
text of the kind that was trained on: the loss, and the KL of the predictions to the teacher's.

What lies under ``--out`` is not made again. Writes ``benchmarks/changes.json`` and ``.md`` after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

from benchmarks import recovery
from benchmarks.equal_bytes import students
from lizard_jax.atomic import write_atomic
from lizard_jax.config import LizardConfig
from lizard_jax.convert.load import load_hf
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from lizard_jax.program import ended
from lizard_jax.train.run import load_run

BASE = "lizard, pairs by head"
"""The recipe's row in ``recovery.py``."""
CHANGES: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "a learned sink for the first real tokens": {"meta": "sink"},
    "every head a map of its own, on all RoPE pairs": {"feature_start": "random"},
    "fixed start, β = −3": {"measured_start": False, "beta_start": -3.0},
    "fixed start, β = −12": {"measured_start": False},
    "error not relative to the layer's power": {},
}
ABSOLUTE = "error not relative to the layer's power"
SHARES = (0.9, 0.0, 1.0)
"""Of KL in stage 2."""
PLAIN_ERROR = """
import sys
from lizard_jax.train import __main__ as command, stages

stages.head_power = lambda target, segments: (segments != 0).sum().astype("float32")
sys.exit(command.main())
"""
"""Stage 1 with the mean squared error of every layer as it is, which no flag of train.py asks for."""


def held_out(where: Path) -> dict[str, float]:
    """A stage's last validation: ``loss``, and ``kl``, how far the predictions are from the teacher's."""
    lines = map(json.loads, (where / "metrics.jsonl").read_text().splitlines())
    last = [line["validation"] for line in lines if "validation" in line][-1]
    return {name: last[name] for name in ("loss", "kl")}


def write(args: argparse.Namespace, settings: dict[str, Any], rows: dict[str, Any]) -> None:
    """The table as JSON and Markdown."""
    write_atomic(args.table.with_suffix(".json"), json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    extent = str(args.extents[0])
    names = [f"{a}–{b - 1}" for a, b in recovery.buckets(int(extent))]
    heads = ["MiB of state", *names, "held-out loss", "its KL"]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, row in rows.items():
        cells = [f"{loss:.3f}" for loss in row["scores"][extent]["losses"]]
        cells[-1] += f" ± {row['scores'][extent]['error']:.3f}" if name != "teacher" else ""
        cells += [f"{row['held_out'][one]:.3f}" if "held_out" in row else "" for one in ("loss", "kl")]
        lines.append(f"| {name} | {row['bytes'][extent] / 2**20:.2f} | " + " | ".join(cells) + " |")
    write_atomic(args.table.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    recovery.check(args.teacher, *args.train, *args.score)
    if unknown := set(args.rows or ()) - set(CHANGES):
        raise UserError(f"no row {', '.join(sorted(unknown))}; choose from {', '.join(CHANGES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    text = recovery.training_text(args.train, load_tokenizer(args.teacher), args.out)
    base = students(args.window, args.teacher, curves=recovery.needs(args, text))[BASE]
    keep = ("window", "tokens", "tokens2", "learning_rate", "learning_rate2", "length", "length2", "batch", "texts")
    settings = {name: getattr(args, name) for name in keep} | {
        "train": [path.name for path in args.train], "score": [path.name for path in args.score],
    }  # fmt: skip
    file = args.table.with_suffix(".json")
    old = json.loads(file.read_text()) if file.is_file() else {}
    rows: dict[str, Any] = old["rows"] if old.get("settings") == settings else {}
    original = once(lambda: load_hf(args.teacher, dtype="float32"))
    teacher = recovery.scored(args, original, args.out / "teacher")
    original.cache_clear()
    rows["teacher"] = {"bytes": recovery.sizes(args, None), "scores": recovery.summary(teacher, teacher)}

    def add(name: str, attention: LizardConfig, when: str, where: Path) -> None:
        untrained, stage = when == recovery.WHENS[0], where / when.replace(" ", "")
        ready: Callable[[], Any] = once(
            lambda: recovery.student(args, attention, when, where, text) if untrained else load_run(stage, "latest")[0]
        )
        scores = recovery.scored(args, ready, where / "scores" / when.replace(" ", "_"))
        rows[name] = {"bytes": recovery.sizes(args, attention), "scores": recovery.summary(scores, teacher)}
        if not untrained:
            rows[name]["held_out"] = held_out(stage)
        write(args, settings, rows)

    for name in args.rows or CHANGES:
        attention, where = dataclasses.replace(base, **CHANGES[name]), recovery.folder(args, name)
        if name != ABSOLUTE and recovery.WHENS[0] in args.whens:
            add(f"{name}, no training", attention, "no training", where)
        if recovery.WHENS[1] not in args.whens:
            continue
        command = ["-c", PLAIN_ERROR] if name == ABSOLUTE else None
        recovery.train(args, attention, 1, where, text, command)
        add(f"{name}, stage 1", attention, "stage 1", where)
    for share in args.shares if recovery.WHENS[2] in args.whens else ():
        first, where = recovery.folder(args, "the recipe"), recovery.folder(args, f"stage 2 {share:g}")
        if not (first / "stage1" / "result.json").is_file():
            raise UserError("stage 2 goes on from the recipe's stage 1; let --rows have it")
        if not (where / "stage1").is_dir():
            shutil.copytree(first / "stage1", where / "stage1")
        args.kl = share
        recovery.train(args, base, 2, where, text)
        add(f"the recipe, stage 2, {share:.0%} KL", base, "stage 2", where)
    return 0


def main() -> int:
    """Train what is missing, score it, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recovery.add_budget(parser)
    parser.add_argument("--rows", nargs="*", default=None, metavar="NAME", help="these rows alone")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of KL in stage 2 (default 0.9 0 1)")
    parser.add_argument(
        "--whens", nargs="+", choices=recovery.WHENS, default=recovery.WHENS, help="these moments alone"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/changes"), help="where the runs go")
    parser.add_argument(
        "--table", type=Path, default=recovery.ROOT / "benchmarks" / "changes", help="the table, less suffix"
    )
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; what is trained and scored so far is kept")


if __name__ == "__main__":
    sys.exit(main())
