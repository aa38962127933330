"""What students of one teacher can still do, beside it: endings of HellaSwag, passkeys, recall, answers.

    uv run --group test benchmarks/tasks.py --teacher runs/smollm2 --students mine=runs/mine/stage2 \
        --hellaswag hellaswag.txt.bz2 --book books.txt --ask --out runs/tasks

A student is a stage directory, a Flax or an HF directory. HellaSwag is asked as ``local_tasks.py`` says; passkeys of
five tokens, five in a text, hide in the last document of ``--book`` and are asked for in the tokenizer's chat form, a
lone one as a sentence to end; recall is of one of four pairs of random tokens. Percent right. What lies in ``--out``
is not asked again. Writes ``benchmarks/tasks.json`` and ``.md``, with ``--ask`` some greedy answers too.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks import named
from benchmarks.recovery_tasks import done, tasks
from lizard_jax.atomic import write_atomic
from lizard_jax.convert.load import load_hf
from lizard_jax.errors import UserError
from lizard_jax.models import Llama
from lizard_jax.program import ended

ROOT = Path(__file__).resolve().parents[1]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a model, a column a number; then the answers."""
    columns = [
        (task, name) for task, found in next(iter(rows.values())).items() if task != "answers" for name in found
    ]  # fmt: skip
    lines = ["| | " + " | ".join(f"{task} {name}" for task, name in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, found in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{found[task][column]:.1f}" for task, column in columns) + " |")
    for name, found in rows.items():
        for question, answer in found.get("answers", {}).items():
            quoted = "\n".join(f"> {line}" for line in answer.strip().splitlines())
            lines += ["", f"**{name}**: {question}", "", quoted]
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    if not tasks(args):
        raise UserError("nothing to ask; give --hellaswag, --book or --ask")
    teacher = functools.partial(load_hf, args.teacher, dtype="float32")
    cases = {"teacher": teacher, **named.students(args.students)}
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, load in cases.items():
        ready: functools.partial[Llama] | Any = functools.cache(load)
        rows[name] = done(args, ready, args.out / name)
        print(name, json.dumps({task: found for task, found in rows[name].items() if task != "answers"}), flush=True)
        jax.clear_caches()  # a model's programs take gigabytes, and the next has its own
    settings = {name: getattr(args, name) for name in ("questions", "lengths", "samples")}
    write_atomic(args.table.with_suffix(".json"), json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    write_atomic(args.table.with_suffix(".md"), table(rows))
    print(table(rows))
    return 0


def main() -> int:
    """Ask what has not been asked and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="HF directory of the teacher")
    parser.add_argument("--students", nargs="*", default=[], metavar="NAME=DIR", help="beside it")
    parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="questions, six lines each")
    parser.add_argument("--questions", type=int, default=400, help="most of them (default %(default)s)")
    parser.add_argument("--book", type=Path, metavar="PATH", help="hide passkeys in the last document of this text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="default %(default)s")
    parser.add_argument("--samples", type=int, default=8, help="texts of each length (default %(default)s)")
    parser.add_argument("--ask", action="store_true", help="write down some answers of each")
    parser.add_argument("--out", type=Path, default=Path("runs/tasks"), help="what was found (default %(default)s)")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "tasks", help="the table, less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; what was found is kept")


if __name__ == "__main__":
    sys.exit(main())
