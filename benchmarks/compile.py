"""Every kernel compiled for every chip it is for, without the chip: on-chip memory, registers, spills, TPU schedules.

    python benchmarks/compile.py [--only WORD …]

At the attention shape of Llama-3-8B (N=32, K=8, H=128, T=2048, bf16), F=128 and 256; what is compiled is listed in
``benchmarks/chips/gates.py``. Needs the ``test`` group. Prints a table and writes ``benchmarks/compile.json``, a row a
kernel; with ``--only`` it prints alone. Exits 1 if anything does not compile, a GPU kernel spills more than it may,
or a v5e pass takes more cycles than it may.

``shared`` is the shared memory of a block on a GPU, ``vmem`` the scoped VMEM of a call on a TPU, in bytes.
``registers`` are a thread's on a GPU; on a TPU the 4 KiB vector registers alive at the tightest place before they are
allotted, of which a core has 64 (none where the compiler saw no shortage). ``spills`` are the bytes stored and loaded
for want of registers, each instruction of the program counted once: a thread's on a GPU, a core's on a TPU. A TPU
kernel works on blocks larger than its registers and keeps them in VMEM, one load away: spills there are usual, and a
cost, not a failure. It is in ``bundles``, the instruction words of a grid step as the compiler scheduled them, one a
cycle: times the ``steps`` of the grid they are the cycles of a call that never waits for memory.

``traffic`` is of the whole pass: bytes of device memory moved over compulsory bytes, where kernels and what XLA adds
around them read operands and write results once, and compulsory are arguments and results. At batch ``B`` 1 the Triton
kernels split the sequence and keep states in device memory; at 16, which fills the card, one pass spares them that. It
may spill a little (``most_spills``); at batch 1 nothing may spill on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tqdm import tqdm

from benchmarks.chips.compilers import TPUS
from benchmarks.chips.gates import Gate, gates

HERE = Path(__file__).resolve().parent
VERSIONS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "triton", "jax-triton")


def rows_of(gate: Gate) -> list[dict]:
    """A row per kernel, or one that says why there is none."""
    row = {"kernel": f"{gate.op}/{gate.implementation}", "pass": gate.passes, "F": gate.F, "B": gate.B}
    row |= {"target": gate.chip, "most_spills": gate.most_spills}
    start = time.perf_counter()
    try:
        compiled = gate.compile()
    except Exception as error:  # Whatever a compiler raises is the finding.
        return [{**row, "error": str(error).strip().splitlines()[0]}]
    if not compiled.kernels:
        return [{**row, "error": "compiled, without a kernel in it"}]
    seconds = round(time.perf_counter() - start, 1)
    memory = "vmem" if gate.chip in TPUS else "shared"
    of_pass: dict = {"traffic": round(compiled.traffic, 2), "seconds": seconds}
    if (schedule := gate.over_roofline(compiled)) is not None:
        of_pass |= {"over_roofline": round(schedule, 2), "most_over_roofline": gate.most_over_roofline}
    return [
        {**row, "name": k.name, memory: k.memory, "registers": k.registers, "spills": k.spills}
        | ({"bundles": k.bundles, "steps": k.steps} if memory == "vmem" else {})
        | of_pass
        for k in compiled.kernels
    ]


def table(rows: list[dict]) -> str:
    """One line per row."""
    heads = ["kernel", "pass", "F", "B", "target", "name"]
    heads += ["memory", "registers", "spills", "bundles", "steps", "over_roofline", "traffic"]
    lines = [heads]
    for row in rows:
        memory = row.get("vmem", row.get("shared"))
        cells = [row["kernel"], row["pass"], row["F"], row["B"], row["target"]]
        if "error" in row:
            cells.append(row["error"])
        else:
            cells += [row["name"], memory, row["registers"], row["spills"]]
            cells += [row.get("bundles"), row.get("steps"), row.get("over_roofline"), row["traffic"]]
        lines.append(["" if cell is None else str(cell) for cell in cells])
    widths = [max(len(line[i]) for line in lines if len(line) == len(heads)) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines
    )


def failures(rows: list[dict]) -> list[dict]:
    """What does not compile, GPU kernels that spill more than they may, v5e ones whose schedule takes too long."""
    return [
        row
        for row in rows
        if "error" in row
        or ("shared" in row and row["spills"] > row["most_spills"])
        or row.get("over_roofline", 0.0) > row.get("most_over_roofline", 0.0)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", default=[], help="compile only what has all these words in its name"
    )
    arguments = parser.parse_args()
    chosen = [gate for gate in gates() if all(word in str(gate) for word in arguments.only)]
    if not chosen:
        print(f"nothing has {' and '.join(arguments.only)} in its name; the last one is {list(gates())[-1]}")
        return 2
    rows: list[dict] = []
    for gate in (progress := tqdm(chosen, disable=None)):
        progress.set_postfix_str(str(gate))
        rows += rows_of(gate)
    print(table(rows))
    failed = failures(rows)
    print(f"\n{len(chosen)} compiled, {len(rows)} kernels; {len(failed)} do not compile or take more than they may")
    if not arguments.only:
        versions = {name: importlib.metadata.version(name) for name in VERSIONS}
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        text = f'{{\n  "versions": {json.dumps(versions)},\n  "rows": [\n    {lines}\n  ]\n}}\n'
        (HERE / "compile.json").write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
