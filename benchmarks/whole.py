"""A recipe's step compiled at its whole depth for machines that are not here, beside what a plan continues from two.

    uv run --group test python -m benchmarks.whole [--recipe llama3_8b] [--targets h100-8 …] [--stages 1 2]

Seconds are this machine's processor's, of all threads: *tracing* until there is a program to compile, which every start
pays, and *compiling*, which a start pays whose program is not kept. Sizes are one device's. Both plans are made in one
run, by the recipe's mesh and remat. Nothing has run on any of these machines. Rows that lie in the table are not made
again. Writes ``benchmarks/whole.json`` and ``.md``; with its plan a row of an 8B takes a quarter of an hour for GPUs on
two cores, and up to an hour for TPUs.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.plans import GIVEN, ROOT, filled
from lizard_jax.atomic import write_atomic
from lizard_jax.cli import load_recipe
from lizard_jax.plan.estimate import DEPTHS, Plan, likely, machines, plan, variants
from lizard_jax.plan.report import shape_of
from lizard_jax.program import ended

TABLE = ROOT / "benchmarks" / "whole"
SIZES = ("temporaries", "code", "memory", "links")


def row(recipe: str, stage: int, target: str) -> dict[str, Any]:
    """The step at its depth, and continued to it."""
    config, where = load_recipe(recipe, stage), machines(target)
    shape = likely(config, shape_of(config))
    (settled, mesh), *_ = variants(config, GIVEN, where, shape)
    found: dict[str, Any] = {"layers": shape.num_layers}
    for name, depths in (("whole", (shape.num_layers,)), ("planned", DEPTHS)):
        jax.clear_caches()  # what was traced for the other
        found[name] = _kept(plan(settled, shape, where, mesh, depths))
    return found


def _kept(found: Plan) -> dict[str, Any]:
    """What the table says of a plan."""
    return {name: getattr(found, name) for name in (*SIZES, "tracing", "compiling")}


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: seconds of the processor and GiB of a device, whole and as planned."""
    heads = ("tracing", "compiling", *SIZES)
    lines = [
        "Processor seconds; GiB of a device. As compiled at its whole depth / as continued from "
        f"{' and '.join(map(str, DEPTHS))} layers.", "",
        "| recipe, stage, target | layers | " + " | ".join(heads) + " |", "|---|" + "---:|" * (1 + len(heads)),
    ]  # fmt: skip
    for name, one in rows.items():
        each = [
            f"{one['whole'][head]:.0f} / {one['planned'][head]:.0f}" if head not in SIZES
            else f"{one['whole'][head] / 2**30:.2f} / {one['planned'][head] / 2**30:.2f}"
            for head in heads
        ]  # fmt: skip
        lines.append(f"| {name} | {one['layers']} | " + " | ".join(each) + " |")
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    file = args.table.with_suffix(".json")
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    wanted = {
        f"{args.recipe}, {stage}, {target}": functools.partial(row, args.recipe, stage, target)
        for stage in args.stages
        for target in args.targets
    }
    for done in filled(rows, wanted):
        rows = done
        write_atomic(file, json.dumps(rows, indent=1) + "\n")
    text = tables(rows)
    write_atomic(args.table.with_suffix(".md"), text)
    print(text)
    return 0


def main() -> int:
    """Compile what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llama3_8b", help="default %(default)s")
    parser.add_argument("--targets", nargs="+", default=("h100-8",), metavar="CHIPS", help="default h100-8")
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=(1, 2), help="default 1 2")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table, less suffix; default %(default)s")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; the rows so far are kept")


if __name__ == "__main__":
    sys.exit(main())
