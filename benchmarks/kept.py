"""Kept pairs without training: how a budget is best split between window and pairs, and how old attention counts.

    uv run benchmarks/kept.py --teacher runs/smollm2 --score books.txt

Every row has the bytes of a plain window of ``--budget`` tokens a key head, with the first four real tokens beside it.
Loss is in nats of positions from half of ``--length`` on, in stretches of the last document of ``--score`` (or in the
articles of a text of headings), see ``recovery.py``. Writes ``benchmarks/kept.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.equal_bytes import pairs_worth
from benchmarks.recovery import losses, score_texts
from lizard_jax.atomic import write_atomic
from lizard_jax.config import LizardConfig
from lizard_jax.convert.files import read_json
from lizard_jax.convert.hf_config import model_config
from lizard_jax.convert.load import load_hf
from lizard_jax.errors import UserError
from lizard_jax.nn import kept_pairs
from lizard_jax.program import ended

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Score what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="HF directory of the teacher")
    parser.add_argument("--score", type=Path, nargs="+", required=True, metavar="PATH", help="texts that are scored")
    parser.add_argument("--budget", type=int, default=258, help="window tokens of equal bytes (default %(default)s)")
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 96, 128, 160], help="W (default %(default)s)")
    parser.add_argument("--fades", type=float, nargs="+", default=[0.7, 0.9, 1.0], help="default %(default)s")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text (default %(default)s)")
    parser.add_argument("--texts", type=int, default=4, help="most texts (default %(default)s)")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "kept", help="the table, less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; no table was written")


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    texts = score_texts(args, args.length)
    width = model_config(read_json(args.teacher / "config.json")).head_dim
    cases: list[tuple[str, LizardConfig | None, float]] = [("teacher", None, 1.0)]
    cases.append((f"window {args.budget}", LizardConfig(memory="none", window=args.budget), 1.0))
    for window in args.windows:
        count = pairs_worth(args.budget, window, width)
        if count < 1:
            raise UserError(f"a window of {window} leaves no room for pairs in a budget of {args.budget} tokens")
        for fade in args.fades:
            attention = LizardConfig(memory="none", window=window, kept=count)
            cases.append((f"window {window}, {count} pairs, fade {fade}", attention, fade))
    rows: dict[str, Any] = {}
    usual = kept_pairs.FADE
    for name, attention, fade in cases:
        kept_pairs.FADE = fade
        model = load_hf(args.teacher, attention=attention, dtype="float32")
        each = losses(model, texts)[:, args.length // 2 :].mean(axis=1)
        rows[name] = {"loss": float(each.mean()), "texts": each.tolist()}
        print(f"{name}: {each.mean():.4f}", flush=True)
    kept_pairs.FADE = usual
    settings = {"score": [path.name for path in args.score], "length": args.length, "texts": len(texts)}
    write_atomic(args.table.with_suffix(".json"), json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    best = np.asarray(rows[f"window {args.budget}"]["texts"])
    lines = [f"Loss in nats, {len(texts)} texts; ± of the difference from the plain window, paired by text:", ""]
    lines += ["| | loss | |", "|---|---:|---:|"]
    for name, row in rows.items():
        apart = np.asarray(row["texts"]) - best
        error = apart.std(ddof=1) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
        lines.append(f"| {name} | {row['loss']:.3f} | {apart.mean():+.3f} ± {error:.3f} |")
    write_atomic(args.table.with_suffix(".md"), "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
