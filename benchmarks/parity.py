"""The parity suite, long: thousands of drawn cases of one implementation against its definition in float64.

    python -m benchmarks.parity --implementation xla --cases 10000
    python -m benchmarks.parity --op sliding_window --implementation xla --cases 1000

Each case draws a shape (T 1 to 1,000, G 1 to 8, F and H 16 to 256, with and without the feature map inside), a dtype,
and values, gates and segments as ``tests/kernels/parity.py`` does; of the window as ``parity_window.py`` does. A case
has several rows, for the relative error of a result that is but a few sums of random signs tells how they cancelled. A
line per case goes to ``runs/parity/OP/NAME.jsonl``; the worst of every result stays in ``benchmarks/parity.json``,
beside those of other implementations. Kernels run on their hardware where it is here, and in their interpreters,
slowly, where it is not. A case that misses the tolerance is kept with what the plain definition makes of it in the same
dtype: where that misses too, the dtype and not the kernel is at its end. Exits 1 if a case is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from tests.kernels import parity, parity_window
from tests.kernels.parity import Shape
from tests.kernels.parity_window import Shape as Window

HERE = Path(__file__).resolve().parent
SHAPES = [
    Shape(16, 1, 8, 1, 1, 16, 16),
    Shape(16, 3, 4, 4, 4, 32, 16, normalize=False),
    Shape(16, 16, 2, 1, 2, 16, 64),
    Shape(8, 63, 4, 1, 1, 16, 16),
    Shape(8, 64, 6, 2, 2, 48, 16),
    Shape(8, 65, 4, 2, 4, 16, 32, normalize=False),
    Shape(8, 100, 7, 1, 1, 32, 32),
    Shape(8, 128, 4, 4, 4, 64, 48),
    Shape(8, 129, 8, 2, 2, 128, 64),
    Shape(4, 200, 2, 2, 2, 16, 256),
    Shape(4, 257, 2, 1, 1, 256, 128),
    Shape(4, 500, 4, 2, 2, 16, 16, chunk=16),
    Shape(4, 640, 3, 1, 3, 32, 16, chunk=128),
    Shape(4, 1000, 2, 1, 1, 16, 16),
    Shape(16, 2, 4, 2, 2, 16, 16, act="softmax", X=16),
    Shape(16, 33, 4, 2, 4, 32, 16, act="exp", X=32),
    Shape(8, 70, 4, 1, 1, 64, 64, act="softmax", X=16),
    Shape(8, 130, 8, 1, 1, 32, 48, act="exp", X=48),
    Shape(4, 200, 2, 2, 2, 128, 64, act="exp", X=64),
    Shape(4, 300, 2, 1, 2, 16, 16, act="softmax", X=32),
    Shape(4, 1000, 2, 1, 1, 16, 16, act="exp", X=16),
]
WINDOWS = [
    Window(64, 1, 2, 2, 16, 1),
    Window(8, 7, 4, 4, 32, 3, rope=False, learned=3),
    Window(8, 33, 8, 1, 16, 16, prefix=2),
    Window(8, 63, 8, 1, 16, 64, sink=False),
    Window(8, 64, 6, 2, 48, 33, prefix=4),
    Window(4, 128, 2, 1, 128, 32, rope=False, learned=2, prefix=3, own_prefix=True),
    Window(4, 129, 4, 2, 64, 128),
    Window(8, 20, 2, 1, 256, 140),
    Window(4, 300, 2, 2, 16, 130, sink=False, prefix=2, own_prefix=True),
    Window(4, 530, 3, 1, 16, 20, learned=4),
    Window(4, 1000, 2, 1, 16, 8),
]
OPS = {"log_gate_attention": (parity, SHAPES), "sliding_window": (parity_window, WINDOWS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, default="log_gate_attention", help="(default %(default)s)")
    parser.add_argument("--implementation", default="xla", help="which one (default %(default)s)")
    parser.add_argument("--cases", type=int, default=10_000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "parity.json", help="summary (default %(default)s)")
    arguments = parser.parse_args()
    name, (suite, shapes) = arguments.implementation, OPS[arguments.op]
    if name == "reference" or name not in suite.implementations():
        known = ", ".join(other for other in suite.implementations() if other != "reference")
        print(f"error: no implementation {name!r} to measure here; choose from {known}", file=sys.stderr)
        return 2
    if arguments.cases < 1:
        print("error: --cases must be at least 1", file=sys.stderr)
        return 2
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    rng = np.random.default_rng(arguments.seed)
    log = Path("runs/parity") / arguments.op / f"{name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)

    worst: dict[str, dict[str, dict]] = {}
    counts: dict[str, int] = {}
    missed: list[dict] = []
    start = time.time()
    # Shape by shape, so that each is compiled once.
    plan = sorted(
        (int(rng.integers(len(shapes))), str(rng.choice(["float32", "bfloat16"])), i) for i in range(arguments.cases)
    )
    with log.open("w") as lines:
        for shape, dtype, case in tqdm(plan, unit="case", desc=name):
            values = suite.draw(np.random.default_rng((arguments.seed, case)))
            errors = suite.errors(name, shapes[shape], values, dtype)
            inputs = {"shape": dataclasses.asdict(shapes[shape]), "draw": dataclasses.asdict(values)}
            lines.write(json.dumps({"case": case, "dtype": dtype, "errors": errors} | inputs) + "\n")
            counts[dtype] = counts.get(dtype, 0) + 1
            if over := [result for result, error in errors.items() if not error <= parity.TOLERANCE[dtype]]:
                plain = suite.errors("reference", shapes[shape], values, dtype)
                both = {result: {name: errors[result], "definition": plain[result]} for result in over}
                missed.append({"case": case, "dtype": dtype, "errors": both} | inputs)
            for result, error in errors.items():
                before = worst.setdefault(dtype, {}).get(result)
                if before is None or not error <= before["error"]:
                    worst[dtype][result] = {"error": error} | inputs

    kept = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    options = f"--op {arguments.op} --implementation {name} --cases {arguments.cases} --seed {arguments.seed}"
    kept[f"{arguments.op}/{name}"] = {
        "command": f"python -m benchmarks.parity {options}",
        "platform": jax.default_backend(),
        "interpreted": name in parity.STAND_INS and parity.STAND_INS[name].platform != jax.default_backend(),
        "cases": counts, "missed": missed, "seconds": round(time.time() - start), "worst": worst,
    }  # fmt: skip
    part = arguments.out.with_suffix(".part")
    part.write_text(json.dumps(kept, indent=1) + "\n")
    part.replace(arguments.out)
    print(f"{'result':8}" + "".join(f"{dtype:>12}" for dtype in worst))
    for result in worst[next(iter(worst))]:
        row = [f"{worst[dtype][result]['error']:.1e}" if result in worst[dtype] else "-" for dtype in worst]
        print(f"{result:8}" + "".join(f"{cell:>12}" for cell in row))
    for case in missed:
        for result, error in case["errors"].items():
            inputs = f"{error[name]:.1e}, the definition in {case['dtype']} {error['definition']:.1e}"
            print(f"missed: case {case['case']}, {result}: {inputs}")
    print(f"{arguments.cases} cases, {len(missed)} missed; every case in {log}, the worst in {arguments.out}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
