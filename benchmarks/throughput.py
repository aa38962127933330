"""How fast both stages train on the accelerator at hand, beside what a plan says that its chip cannot beat.

    uv run --extra cuda benchmarks/throughput.py [--recipe llama3_2_1b] [--batch 8]

The recipe's model with random weights and text, the whole step of ``train.py`` (forward passes, gradients, optimizer)
on one device, for three attentions: ``window and memory`` is the preset ``lizard`` by the chip's kernels; ``plain JAX``
the same without kernels; ``recipe`` what the recipe ships, with its exact heads and kept pairs. Tokens a second,
``teacher MFU`` (the FLOPs of one forward pass of the teacher over the chip's peak), ``matmuls`` (the share of the peak
that the step's own matrix products reach), memory that a step needs beside weights, seconds to trace and compile.
``× plan`` is the measured time over the least of ``train.py --plan``: compute at the peak or memory at full
rate, whichever is longer.

Programs are compiled side by side; then steps are timed one program after another, medians. Prints a table and writes
``benchmarks/throughput.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from benchmarks.timing import say
from lizard_jax import sharding
from lizard_jax.atomic import write_atomic
from lizard_jax.cli import load_recipe
from lizard_jax.config import LizardConfig, ModelConfig, RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.errors import UserError
from lizard_jax.lora import add_lora
from lizard_jax.models import build
from lizard_jax.models.flops import forward_flops
from lizard_jax.plan.estimate import likely, shallow
from lizard_jax.plan.program import moved
from lizard_jax.plan.report import shape_of
from lizard_jax.plan.step import flops
from lizard_jax.program import ended
from lizard_jax.train.optim import Optimizer
from lizard_jax.train.report import versions
from lizard_jax.train.step import TrainState, place, train_step
from pallas_kernels import chips, target

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("window and memory", "plain JAX", "recipe")
ONE = (1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Program:
    """A step, compiled, with what it is called with.

    Attributes:
        seconds: to trace it, and to compile it.
        temporaries: bytes that it needs beside what it is called with.
        memory: bytes that it moves to and from the device's memory, by its text.
    """

    name: str
    config: RunConfig
    shape: ModelConfig
    state: TrainState
    step: Any
    seconds: tuple[float, float]
    temporaries: int
    memory: float


def settled(recipe: str, stage: int, kind: str, args: argparse.Namespace) -> tuple[RunConfig, ModelConfig]:
    """The run, and the model's shape with its attention."""
    config = load_recipe(recipe, stage)
    data = dataclasses.replace(config.data, batch_size=args.batch, sequence_length=args.length)
    config = dataclasses.replace(config, data=data, remat=args.remat)
    if kind != "recipe":
        config = dataclasses.replace(config, attention=LizardConfig(), heads="", state_bytes="")
    shape = likely(config, shape_of(config))
    return config, shallow(shape, min(args.layers or shape.num_layers, shape.num_layers))


def built(name: str, config: RunConfig, shape: ModelConfig) -> Program:
    """The model with random weights on the device, and its step."""
    mesh, optimizer = sharding.make_mesh(config.mesh), Optimizer(config.optim, 100)

    model = build(shape, dtype=config.dtype, rngs=nnx.Rngs(0))
    if config.stage == 2:
        add_lora(model, config.lora, nnx.Rngs(1))
    state = place(config, model, optimizer, mesh)
    plain = target.override(target.Target("cpu")) if name.endswith("plain JAX") else contextlib.nullcontext()
    began = time.perf_counter()
    with plain:
        step: Any = train_step(config, optimizer, state, mesh)
        lowered = step.lower(state.trainable, state.optimizer, state.frozen, batch_of(config, shape))
    traced = time.perf_counter()
    compiled = lowered.compile()
    seconds = traced - began, time.perf_counter() - traced
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    return Program(
        name, config, shape, state, compiled, seconds, memory.temp_size_in_bytes if memory else 0, moved(text, 1).memory
    )


def batch_of(config: RunConfig, shape: ModelConfig) -> Batch:
    """Random tokens, one document a row."""
    rows = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, rows).astype(np.int32)
    return Batch(tokens, tokens, np.ones(rows, np.int32), np.ones(rows, np.float32))


def timed(one: Program, steps: int) -> float:
    """Median seconds of a step."""
    state, batch, taken = one.state, jax.device_put(batch_of(one.config, one.shape)), []
    trainable, moments, metrics = state.trainable, state.optimizer, {}
    for _ in range(1 + steps):
        began = time.perf_counter()
        trainable, moments, metrics = one.step(trainable, moments, state.frozen, batch)
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - began)
    if not np.isfinite(float(metrics["loss"])):
        raise UserError(f"{one.name}: the loss is {float(metrics['loss'])}")
    return float(np.median(taken[1:]))


def row(one: Program, seconds: float) -> dict[str, Any]:
    """What is told of a program."""
    tokens, chip = one.config.data.batch_size * one.config.data.sequence_length, chips.here(jax.devices()[0])
    found: dict[str, Any] = {
        "name": one.name, "stage": one.config.stage, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "temporary_bytes": one.temporaries, "moved_bytes": one.memory, "trace_seconds": one.seconds[0],
        "compile_seconds": one.seconds[1], "forward_flops": forward_flops(one.shape, tokens),
        "flops": flops(one.config, one.shape),
    }  # fmt: skip
    if chip is not None:
        least = max(found["flops"] / chip.flops, one.memory / chip.bandwidth)
        found |= {"teacher_mfu": found["forward_flops"] / chip.flops / seconds, "over_plan": seconds / least}
        found["matmuls"] = found["flops"] / chip.flops / seconds
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| stage, attention | tokens/s | ms a step | teacher MFU | matmuls | × plan | temporary GiB | trace, compile |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        share = [f"{100 * one[name]:.1f}%" if name in one else "-" for name in ("teacher_mfu", "matmuls")]
        over = f"{one['over_plan']:.2f}" if "over_plan" in one else "-"
        times = f"{one['trace_seconds']:.0f}, {one['compile_seconds']:.0f}"
        lines.append(
            f"| {one['name']} | {one['tokens_per_second']:,.0f} | {1e3 * one['seconds']:.1f} | {' | '.join(share)} | "
            f"{over} | {one['temporary_bytes'] / 2**30:.1f} | {times} |"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    wanted = [(stage, kind) for stage in args.stages for kind in args.kinds]
    rows: list[dict[str, Any]] = []
    with (
        tqdm(total=2 * len(wanted), unit="program", disable=None) as bar,
        concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool,
    ):

        def make(stage: int, kind: str) -> Program:
            one = built(f"{stage}, {kind}", *settled(args.recipe, stage, kind, args))
            say(f"{one.name}: traced in {one.seconds[0]:.0f} s, compiled in {one.seconds[1]:.0f}")
            bar.update()
            return one

        made = [pool.submit(make, stage, kind) for stage, kind in wanted]
        concurrent.futures.wait(made)  # so that nothing is timed beside a compiler
        while made:
            one = made.pop(0).result()
            try:
                rows.append(row(one, timed(one, args.steps)))
                say(f"{one.name}: {1e3 * rows[-1]['seconds']:.1f} ms a step")
            except jax.errors.JaxRuntimeError as error:
                print(f"{one.name}: {str(error).splitlines()[0]}", file=sys.stderr)
            del one
            bar.update()
    device = jax.devices()[0].device_kind
    title = f"`{args.recipe}`, {args.layers or 'all'} layers, {args.batch} x {args.length:,} tokens a step, {device}"
    record = {"device": device, "versions": versions(), **vars(args), "rows": rows}
    record["table"] = str(args.table.name)
    write_atomic(args.table.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    text = f"{title}\n\n{table(rows)}\n"
    write_atomic(args.table.with_suffix(".md"), text)
    print(text)
    return int(len(rows) < len(wanted))


def main() -> int:
    """Compile, time and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="llama3_2_1b", help="default %(default)s")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help="default all")
    parser.add_argument(
        "--stages", nargs="+", type=int, default=[1, 2], choices=(1, 2), metavar="N", help="default 1 2"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of the model's (default all)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="rows of a step (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048, metavar="T", help="tokens of a row (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed (default %(default)s)")
    parser.add_argument("--remat", action="store_true", help="recompute blocks in stage 2's backward pass")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "throughput", help="less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
