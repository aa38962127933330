"""What devices exchange in a step: bytes of every collective's result, by kind, of the real step on eight devices.

    uv run benchmarks/collectives.py [--recipe llama3_8b] [--mesh 1 8 1] [--layers 2 4]

The step is compiled for virtual CPU devices, which XLA partitions as it does accelerators; a compiler for those may
join or split collectives, and turn an all-reduce of which a part is used into a reduce-scatter. Bytes are of results,
on one device; a collective inside a loop counts once and is told apart. Layers are alike, so that two depths give the
bytes of any: the table is at ``--depth``. No weight is ever allocated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from flax import nnx

from lizard_jax import sharding
from lizard_jax.atomic import write_atomic
from lizard_jax.cli import load_recipe
from lizard_jax.config import MeshConfig, ModelConfig, RopeConfig, RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.lora import add_lora
from lizard_jax.models import build
from lizard_jax.train import stages
from lizard_jax.train.optim import Optimizer
from lizard_jax.train.step import TrainState, eval_step, train_step

ROOT = Path(__file__).resolve().parents[1]
LLAMA3_8B = ModelConfig(
    "llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, rope=RopeConfig(theta=500000.0),
)  # fmt: skip
BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(text: str) -> Counter[str]:
    """Bytes by kind; those inside a loop under their own name."""
    bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    found: Counter[str] = Counter()
    inside = ""
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(", line):
            inside = start[1]
        if match := re.search(rf"= (.+?) ({KINDS})(?:-start)?\(", line):
            size = 0
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                count = 1
                for n in filter(None, shape.split(",")):
                    count *= int(n)
                size += BYTES[dtype] * count
            found[match[2] + (" in a loop" if inside in bodies else "")] += size
    return found


def step_text(config: RunConfig, shape: ModelConfig, form: str, mesh_config: MeshConfig) -> str:
    """The compiled program of a stage's step, or of its validation."""
    mesh = sharding.make_mesh(mesh_config)
    optimizer = Optimizer(config.optim, 10)

    def make() -> nnx.Module:
        model = build(shape, dtype=config.dtype, rngs=nnx.Rngs(0))
        if config.stage == 2:
            add_lora(model, config.lora, nnx.Rngs(0))
        return model

    graph, trainable, frozen = nnx.split(nnx.eval_shape(make), stages.trainable(config), ...)
    moments = jax.eval_shape(optimizer.init, trainable)
    state = TrainState(graph, trainable, frozen, moments)
    rows = (config.data.batch_size, config.data.sequence_length)
    whole, real = (jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(whole, whole, whole, real)  # type: ignore[arg-type]
    if form == "validation":
        step: Any = eval_step(config, state, mesh)
        return step.lower(trainable, frozen, batch).compile().as_text()
    step = train_step(config, optimizer, state, mesh)
    return step.lower(trainable, moments, frozen, batch).compile().as_text()


def main() -> int:
    """Compile, count, print and write ``benchmarks/collectives.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llama3_8b", help="default %(default)s")
    parser.add_argument("--mesh", type=int, nargs=3, default=[1, 8, 1], help="data, fsdp, tensor (default %(default)s)")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4], help="depths compiled (default %(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="layers of the table (default %(default)s)")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "collectives", help="less suffix")
    told = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for form in ("stage 1", "stage 2", "validation"):
        config = load_recipe(told.recipe, 1 if form == "stage 1" else 2)
        attention = dataclasses.replace(config.attention, kept=0, budgets=())
        config = dataclasses.replace(config, attention=attention)
        found = []
        for layers in told.layers:
            shape = dataclasses.replace(LLAMA3_8B, num_layers=layers, attention=attention)
            found.append(collectives(step_text(config, shape, form, MeshConfig(*told.mesh))))
            print(form, layers, {kind: f"{size / 2**30:.3f} GiB" for kind, size in found[-1].items()}, flush=True)
        (few, many), (low, high) = found, told.layers
        rows[form] = {
            kind: (few[kind] + (many[kind] - few[kind]) * (told.depth - low) / (high - low)) / 2**30
            for kind in sorted(few | many)
        }
    kinds = sorted({kind for row in rows.values() for kind in row})
    lines = [f"GiB of results a step and device, {told.depth} layers, mesh {' x '.join(map(str, told.mesh))}:", ""]
    lines += ["| | " + " | ".join(kinds) + " |", "|---|" + "---:|" * len(kinds)]
    for form, row in rows.items():
        lines.append(f"| {form} | " + " | ".join(f"{row.get(kind, 0.0):.2f}" for kind in kinds) + " |")
    print("\n".join(lines))
    settings = {name: getattr(told, name) for name in ("recipe", "mesh", "layers", "depth")}
    write_atomic(told.table.with_suffix(".json"), json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    write_atomic(told.table.with_suffix(".md"), "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
