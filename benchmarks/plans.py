"""What the recipe of a large model takes of machines that are not here: the real step, compiled for each.

    uv run --group test benchmarks/plans.py [--recipe llama3_8b] [--targets h100-8 v5e-8 …]

Both stages on the mesh of the recipe (FSDP over all devices), as ``train.py --plan`` has them: memory of a device, work
of a step, what it moves, and the time that its chip cannot beat; then the bytes of every kind of collective's results
in a step on one device. Nothing has run on any of these machines. Rows that lie in the table are not made again. Writes
``benchmarks/plans.json`` and ``.md``; two to four minutes a row for GPUs and four to ten for TPUs on two cores. Seconds
of compiling are continued from two depths like all else, so what disturbs the machine meanwhile counts fifteenfold.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lizard_jax.atomic import write_atomic
from lizard_jax.cli import load_recipe
from lizard_jax.plan.estimate import forward_passes, hours, likely, machines, plan, variants
from lizard_jax.plan.report import shape_of
from lizard_jax.program import ended

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("a100-8", "h100-8", "h200-8", "v5e-8", "v6e-8", "v5p-8")
GIVEN = frozenset({"mesh.fsdp", "remat"})
"""As if told: the recipe's mesh alone, with its remat."""


def row(recipe: str, stage: int, target: str) -> dict[str, Any]:
    """One plan, as JSON has it."""
    config, where = load_recipe(recipe, stage), machines(target)
    shape = likely(config, shape_of(config))
    (settled, mesh), *_ = variants(config, GIVEN, where, shape)
    start = time.perf_counter()
    found = plan(settled, shape, where, mesh)
    out = dataclasses.asdict(found) | {"total": found.total, "least": found.least, "most": found.most}
    out["rows"], out["hours"] = settled.data.batch_size, hours(settled, found, where.devices)
    out["forward_passes"] = forward_passes(settled, shape, found)
    out["compiling"] += out.pop("tracing")
    out["seconds"] = round(time.perf_counter() - start)
    return out


def tables(recipe: str, rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: the plans, and the collectives."""
    lines = [
        f"`{recipe}`, a step of {next(iter(rows.values()))['rows']} x 2,048 tokens, FSDP over all devices. GiB of a "
        "device; milliseconds of a step at the chip's peaks for matmuls, its own memory and its links, and from all of "
        "these overlapping to none; device-hours of the recipe's 20 M tokens; seconds of a processor to compile.", "",
        "| stage, target | weights | all | TFLOP | compute | memory | links | step | device-hours | compiling |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, one in rows.items():
        weights = (one["parts"]["frozen"] + one["parts"]["trained"]) / 2**30
        times = " | ".join(f"{1e3 * one[part]:.0f}" for part in ("compute", "reading", "sending"))
        low, high = one["hours"]
        lines.append(
            f"| {name} | {weights:.2f} | {one['total'] / 2**30:.2f} | {one['flops'] / 1e12:,.0f} | {times} | "
            f"{1e3 * one['least']:.0f}–{1e3 * one['most']:.0f} | {low:.1f}–{high:.1f} | {one['compiling']:.0f} |"
        )
    kinds = sorted({kind for one in rows.values() for kind, size in one["kinds"].items() if size > 2**20})
    lines += ["", "GiB of collectives' results in a step, on one device:", "", "| | " + " | ".join(kinds) + " |"]
    lines.append("|---|" + "---:|" * len(kinds))
    for name, one in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{one['kinds'].get(kind, 0) / 2**30:.2f}" for kind in kinds) + " |")
    return "\n".join(lines) + "\n"


def filled(
    rows: dict[str, dict[str, Any]], wanted: dict[str, Callable[[], dict[str, Any]]]
) -> Iterator[dict[str, dict[str, Any]]]:
    """The rows, in order, each time that one of those wanted was missing and is made."""
    for name, make in tqdm(wanted.items(), unit="row", disable=None):
        if name not in rows:
            rows = dict(sorted((rows | {name: make()}).items()))
            yield rows


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    file = args.table.with_suffix(".json")
    old = json.loads(file.read_text()) if file.is_file() else {}
    rows: dict[str, dict[str, Any]] = old["rows"] if old.get("recipe") == args.recipe else {}
    wanted = {
        f"{stage}, {target}": functools.partial(row, args.recipe, stage, target)
        for stage in (1, 2)
        for target in args.targets
    }
    for done in filled(rows, wanted):
        rows = done
        write_atomic(file, json.dumps({"recipe": args.recipe, "rows": rows}, indent=1) + "\n")
    text = tables(args.recipe, rows)
    write_atomic(args.table.with_suffix(".md"), text)
    print(text)
    return 0


def main() -> int:
    """Compile what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llama3_8b", help="default %(default)s")
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="CHIPS", help=f"default {' '.join(TARGETS)}")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "plans", help="the table, less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; the rows so far are kept")


if __name__ == "__main__":
    sys.exit(main())
