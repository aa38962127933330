"""What the recipe of a large model takes of machines that are not here: the real step, compiled for each.

    uv run --group test benchmarks/plans.py [--recipe llama3_8b] [--targets h100-8 …] [--stages 1 2] [--ways whole]

The recipe's mesh (FSDP over all devices) and remat, as ``train.py --plan`` has them: memory of a device, work of a
step, what it moves, and the time that its chip cannot beat; the bytes of every kind of collective's results in a step
on one device. A step is compiled *whole*, at all its layers, or *continued* from two and four layers as ``--plan`` does
unless told otherwise; a row made both ways says how far the second is off. Nothing has run on any of these machines.

Seconds are this machine's processor's, of all threads: *tracing* until there is a program to compile, which every start
pays, and *compiling*, which a start pays whose program is not kept. Continued seconds are rough: what disturbs the
machine meanwhile counts fifteenfold.

Rows that lie in the table are not made again. Writes ``benchmarks/plans.json`` and ``.md``. On two cores a row of an 8B
takes one to ten minutes for GPUs and four minutes to half an hour for TPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from lizard_jax.atomic import write_atomic
from lizard_jax.cli import load_recipe
from lizard_jax.plan.estimate import DEPTHS, forward_passes, hours, likely, machines, plan, variants
from lizard_jax.plan.report import shape_of
from lizard_jax.program import ended

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("a100-8", "h100-8", "h200-8", "v5e-8", "v6e-8", "v5p-8")
SIZES = ("temporaries", "code", "memory", "links")
"""What a plan continues from two depths."""
WAYS = ("whole", "continued")
GIVEN = frozenset({"mesh.fsdp", "remat"})
"""As if told: the recipe's mesh alone, with its remat."""


def row(recipe: str, stage: int, target: str, way: str) -> dict[str, Any]:
    """One plan, as JSON has it."""
    jax.clear_caches()  # what was traced for another
    config, where = load_recipe(recipe, stage), machines(target)
    shape = likely(config, shape_of(config))
    (settled, mesh), *_ = variants(config, GIVEN, where, shape)
    start = time.perf_counter()
    found = plan(settled, shape, where, mesh, (shape.num_layers,) if way == "whole" else DEPTHS)
    out = dataclasses.asdict(found) | {"total": found.total, "least": found.least, "most": found.most}
    out["rows"], out["hours"] = settled.data.batch_size, hours(settled, found, where.devices)
    out["forward_passes"] = forward_passes(settled, shape, found)
    out["seconds"] = round(time.perf_counter() - start)
    return out


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: the plans, the collectives, and whole programs beside continued ones; rows by recipe, stage, target."""
    best = {name: ways["whole"] if "whole" in ways else ways["continued"] for name, ways in rows.items()}
    lines = [
        "A step of the recipe, FSDP over all devices; rows of 2,048 tokens. GiB of a device; milliseconds of a step at "
        "the chip's peaks for matmuls, its own memory and its links, and from all of these overlapping to none; "
        "device-hours of the recipe's 20 M tokens; processor seconds to trace and to compile.", "",
        "| recipe, stage, target | layers compiled | rows | weights | temporaries | all | TFLOP | compute | memory "
        "| links | step | device-hours | tracing | compiling |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, one in best.items():
        weights = (one["parts"]["frozen"] + one["parts"]["trained"]) / 2**30
        times = " | ".join(f"{1e3 * one[part]:.0f}" for part in ("compute", "reading", "sending"))
        low, high = one["hours"]
        lines.append(
            f"| {name} | {', '.join(map(str, one['depths']))} | {one['rows']} | {weights:.2f} | "
            f"{one['temporaries'] / 2**30:.2f} | {one['total'] / 2**30:.2f} | {one['flops'] / 1e12:,.0f} | {times} | "
            f"{1e3 * one['least']:.0f}–{1e3 * one['most']:.0f} | {low:.1f}–{high:.1f} | {_seconds(one)} |"
        )
    kinds = sorted({kind for one in best.values() for kind, size in one["kinds"].items() if size > 2**20})
    lines += ["", "GiB of collectives' results in a step, on one device:", "", "| | " + " | ".join(kinds) + " |"]
    lines.append("|---|" + "---:|" * len(kinds))
    for name, one in best.items():
        lines.append(f"| {name} | " + " | ".join(f"{one['kinds'].get(kind, 0) / 2**30:.2f}" for kind in kinds) + " |")
    both = {name: ways for name, ways in rows.items() if len(ways) > 1}
    if not both:
        return "\n".join(lines) + "\n"
    lines += [
        "", f"GiB of a device, whole / continued from {' and '.join(map(str, DEPTHS))} layers:", "",
        "| | " + " | ".join(SIZES) + " |", "|---|" + "---:|" * len(SIZES),
    ]  # fmt: skip
    for name, ways in both.items():
        each = [" / ".join(f"{ways[way][size] / 2**30:.2f}" for way in WAYS) for size in SIZES]
        lines.append(f"| {name} | " + " | ".join(each) + " |")
    return "\n".join(lines) + "\n"


def _seconds(one: dict[str, Any]) -> str:
    return " | ".join(f"{one[name]:.0f}" for name in ("tracing", "compiling"))


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    file = args.table.with_suffix(".json")
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    wanted = [
        (f"{args.recipe}, {stage}, {target}", way, (args.recipe, stage, target, way))
        for stage in args.stages
        for target in args.targets
        for way in args.ways
    ]
    for name, way, what in tqdm(wanted, unit="row", disable=None):
        if way not in rows.get(name, {}):
            made = rows.get(name, {}) | {way: row(*what)}
            rows = dict(sorted((rows | {name: {each: made[each] for each in WAYS if each in made}}).items()))
            write_atomic(file, json.dumps(rows, indent=1) + "\n")
    text = tables(rows)
    write_atomic(args.table.with_suffix(".md"), text)
    print(text)
    return 0


def main() -> int:
    """Compile what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llama3_8b", help="default %(default)s")
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="CHIPS", help=f"default {' '.join(TARGETS)}")
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=(1, 2), help="default 1 2")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=("whole",), help="default whole")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "plans", help="the table, less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; the rows so far are kept")


if __name__ == "__main__":
    sys.exit(main())
