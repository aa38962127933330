"""The paper's heat map, and recall of several things at once: students of one teacher beside it.

    uv run benchmarks/retrieval.py --teacher runs/smollm2 --book books.txt --students mine=runs/mine/stage2

A student is a stage directory, a Flax or an HF directory. Five passkeys hide in the last document of ``--book``, and
one is asked for in the tokenizer's chat form (plain where it has none), at each of ``--depths`` parts of texts of
``--lengths`` tokens; in RULER's manner two things are asked for among four. Both are teacher-forced: an answer is
right where each of its tokens is the likeliest, so that a small model is not judged by how it words it. Recall is of
four pairs of random tokens: the right one is the likeliest of the four.

What stands in the table is not asked again. Writes ``benchmarks/retrieval.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
import numpy as np

from benchmarks import named, recovery
from lizard_jax.atomic import write_atomic
from lizard_jax.convert.load import load_hf
from lizard_jax.data.haystack import Measure, sentences
from lizard_jax.data.passkey import PasskeySet
from lizard_jax.data.text import affixes, load_tokenizer
from lizard_jax.eval import passkey, recall, ruler
from lizard_jax.models import Llama
from lizard_jax.program import ended
from lizard_jax.select import budgets

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
KEYS, QUERIES, PAIRS = 5, 2, 4


def found(args: argparse.Namespace, model: Llama, measure: Measure, length: int) -> dict[str, Any]:
    """What a model finds in texts of one length: ``depths`` (a share each), ``queries`` and ``recall``."""
    form = "chat" if measure.tokenizer.chat_template else "plain"
    examples = PasskeySet(measure, length, KEYS, (5, 5), form, depths=args.depths)
    maps = passkey.measure(model, [examples], samples=args.samples, batch=1, teacher_forced=True)
    asked = ruler.measure(
        model, measure, tasks=["multiquery"], lengths=[length], samples=args.queries, needles=QUERIES, form=form,
        batch=1, teacher_forced=True,
    )  # fmt: skip
    pairs = recall.measure(
        model, affixes(measure.tokenizer)[0], recall.ordinary(measure.tokenizer), lengths=[length], pairs=[PAIRS],
        samples=args.queries, batch=1,
    )  # fmt: skip
    return {
        "depths": [cell["accuracy"] for cell in maps["cells"]],
        "queries": asked["score"],
        "recall": pairs["among_values"],
    }


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    recovery.check(args.teacher, args.book)
    teacher = partial(load_hf, args.teacher, dtype="float32")
    cases = {"teacher": teacher, **named.students(args.students)}
    document = args.book.read_text(encoding="utf-8").split("<|endoftext|>")[-1]
    measure = Measure(load_tokenizer(args.teacher), sentences(document))
    settings = {name: getattr(args, name) for name in ("depths", "samples", "queries")}
    file = args.table.with_suffix(".json")
    old = json.loads(file.read_text()) if file.is_file() else {}
    rows: dict[str, Any] = old["rows"] if old.get("settings") == settings else {}
    for name, load in cases.items():
        missing = [length for length in args.lengths if str(length) not in rows.get(name, {}).get("found", {})]
        if not missing:
            continue
        model = load()
        row = rows.setdefault(name, {"found": {}})
        row["bytes"] = budgets.state_bytes(model.config, budgets.LENGTH)
        for length in missing:
            row["found"][str(length)] = found(args, model, measure, length)
            print(name, length, json.dumps(row["found"][str(length)]), flush=True)
            write_atomic(file, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
        jax.clear_caches()  # a model's programs take gigabytes, and the next has its own
    show(args, rows)
    return 0


def show(args: argparse.Namespace, rows: dict[str, Any]) -> None:
    """The table as Markdown, and the heat maps."""
    lengths = sorted(map(int, rows["teacher"]["found"]))
    parts = ("passkey", "two of four", "recall of pairs")
    heads = [f"{part} {length:,}" for part in parts for length in lengths]
    lines = [f"| | MiB at {budgets.LENGTH:,} | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(heads)]
    for name, row in rows.items():
        each = [row["found"].get(str(length)) for length in lengths]
        numbers = [
            f"{100 * float(np.mean(one[part])):.0f}" if one else ""
            for part in ("depths", "queries", "recall") for one in each
        ]  # fmt: skip
        lines.append(f"| {name} | {row['bytes'] / 2**20:.1f} | " + " | ".join(numbers) + " |")
    write_atomic(args.table.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))
    figure, axes = plt.subplots(
        1, len(rows), figsize=(1 + 2.6 * len(rows), 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (name, row) in zip(axes[0], rows.items(), strict=True):
        none = {"depths": [np.nan] * args.depths}
        grid = np.array([row["found"].get(str(length), none)["depths"] for length in lengths]).T
        axis.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for (down, across), value in np.ndenumerate(grid):
            if not np.isnan(value):
                axis.text(across, down, f"{value:.2g}", ha="center", va="center", fontsize="small")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axis.set_yticks(range(args.depths), [f"{100 * (part + 0.5) / args.depths:.0f}%" for part in range(args.depths)])
        axis.set_title(f"{name}\n{row['bytes'] / 2**20:.1f} MiB at {budgets.LENGTH:,}", fontsize="small")
        axis.set_xlabel("tokens")
    axes[0][0].set_ylabel("depth of the passkey")
    figure.savefig(args.table.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> int:
    """Ask what has not been asked and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="HF directory of the teacher")
    parser.add_argument("--book", type=Path, required=True, metavar="FILE", help="its last document hides the keys")
    parser.add_argument("--students", nargs="*", default=[], metavar="NAME=DIR", help="beside the teacher")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="default %(default)s")
    parser.add_argument("--depths", type=int, default=5, help="parts of a text (default %(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="passkeys of a length and depth (default %(default)s)")
    parser.add_argument("--queries", type=int, default=4, help="texts of the other two (default %(default)s)")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "retrieval", help="the table, less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; what was found is kept")


if __name__ == "__main__":
    sys.exit(main())
