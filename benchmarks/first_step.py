"""What a run costs before its first step: seconds of tracing, lowering and compiling, and what the program launches.

    uv run benchmarks/first_step.py runs/mine/stage1
    uv run --group test python -m benchmarks.first_step runs/mine/stage1 --layer 3 --chip v5e --chip h100

The step of a run that lies there, with its own split of key heads; no weight is read. The first form traces and lowers
all of it, for a CPU. With ``--layer`` that layer's linearized heads alone, with their gradient, are compiled for chips
that are not here, for one sequence. Each is done as it is, and once more with nothing shared: every layer traced for
itself, every class of heads in a call of its own. Seconds are of the processor, of all threads. Launches are the
operations of the compiled program that are not free, those in a loop as often as it runs.

Writes ``benchmarks/first_step.json`` and ``.md``; rows of other runs, layers and chips stay.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from lizard_jax.atomic import write_atomic
from lizard_jax.cli import from_dict
from lizard_jax.config import ModelConfig, RunConfig
from lizard_jax.convert.files import read_json
from lizard_jax.errors import UserError
from lizard_jax.nn import reuse, split_attention
from lizard_jax.nn.attention import mixer_of
from lizard_jax.nn.split_attention import SplitMixer
from lizard_jax.plan import absent
from lizard_jax.plan.program import launches
from lizard_jax.plan.step import batch_of, state_of
from lizard_jax.program import ended
from lizard_jax.train import stages
from pallas_kernels.chips import CHIPS

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Nothing is shared inside."""
    with reuse.apart(), mock.patch.object(split_attention, "one_call_pays", return_value=False):
        yield


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and seconds of the processor."""
    began = time.process_time()
    return work(), time.process_time() - began


def step(config: RunConfig, shape: ModelConfig) -> dict[str, float]:
    """Of the whole step: tracing and lowering."""
    state = state_of(config, shape)

    def run(trainable: nnx.State, frozen: nnx.State, batch: Any) -> Any:
        return stages.loss_and_grads(config, nnx.merge(state.graph, trainable, frozen), batch)

    traced, tracing = seconds(lambda: jax.jit(run).trace(state.trainable, state.frozen, batch_of(config)))
    _, lowering = seconds(traced.lower)
    return {"trace": tracing, "lower": lowering}


def layer(shape: ModelConfig, number: int, length: int, name: str) -> dict[str, float]:
    """Of one layer's linearized heads and their gradient on a chip: tracing with lowering, compiling, and launches."""
    chip = CHIPS[name]
    fewest = min(absent.counts(chip) or (1,))
    device = (absent.tpus(chip, fewest) if chip.platform == "tpu" else absent.gpus(chip, fewest))[0]
    mixer = nnx.eval_shape(lambda: mixer_of(shape, number, rngs=nnx.Rngs(0)))
    assert isinstance(mixer, SplitMixer)
    graph, state = nnx.split(mixer)

    def array(dims: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=SingleDeviceSharding(device))

    def loss(state: nnx.State, *arrays: jax.Array) -> jax.Array:
        return jnp.square(nnx.merge(graph, state).linear_heads(*arrays).astype(jnp.float32)).sum()

    kv = (1, length, shape.kv_heads, shape.head_dim)
    given = (
        jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), state), array((1, length, shape.hidden_size)),
        array((1, length, shape.num_heads, shape.head_dim)), array(kv), array(kv),
    )  # fmt: skip
    with absent.compiling_for(chip.platform, chip.target, device) as platforms:
        lowered, before = seconds(lambda: jax.jit(jax.grad(loss)).trace(*given).lower(lowering_platforms=platforms))
        program, compiling = seconds(lowered.compile)
    return {"trace and lower": before, "compile": compiling, "launches": launches(program.as_text() or "")}


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    if unknown := set(args.chip) - set(CHIPS):
        raise UserError(f"no chip {', '.join(sorted(unknown))}; the chips are {', '.join(CHIPS)}")
    if (args.layer is None) == bool(args.chip):
        raise UserError("--layer and --chip belong together: one layer is compiled for chips, all are traced without")
    record = read_json(args.run / "run.json")
    config, shape = from_dict(RunConfig, record["config"]), from_dict(ModelConfig, record["model"])
    name, cases = args.run.parent.name, {}
    if args.layer is None:
        cases[f"{name}, stage {config.stage}, {shape.num_layers} layers"] = lambda: step(config, shape)
    else:
        if args.layer >= shape.num_layers or not isinstance(mixer_of(shape, args.layer, rngs=nnx.Rngs(0)), SplitMixer):
            raise UserError(f"layer {args.layer} has no classes of heads; give another --layer")
        for chip in args.chip:
            length = config.data.sequence_length
            cases[f"{name}, layer {args.layer}, {chip}"] = lambda c=chip, n=length: layer(shape, args.layer, n, c)
    file = args.table.with_suffix(".json")
    rows: dict[str, Any] = read_json(file) if file.is_file() else {}
    for case, measure in cases.items():
        rows[case] = {"shared": measure()}
        jax.clear_caches()
        with apart():
            rows[case]["apart"] = measure()
        jax.clear_caches()
        print(case, json.dumps(rows[case]), flush=True)
        write_atomic(file, json.dumps(rows, indent=1) + "\n")
    lines = ["| | | shared | apart |", "|---|---|---:|---:|"]
    for case, row in rows.items():
        for part, value in row["shared"].items():
            digits = 0 if part == "launches" else 1
            lines.append(f"| {case} | {part} | {value:,.{digits}f} | {row['apart'][part]:,.{digits}f} |")
    write_atomic(args.table.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="STAGE", help="a run's stage directory")
    parser.add_argument("--layer", type=int, metavar="N", help="that layer's heads alone, compiled for --chip")
    parser.add_argument("--chip", action="append", default=[], help=f"of {', '.join(CHIPS)}; may stand more than once")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "first_step", help="the table, less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; the rows so far are kept")


if __name__ == "__main__":
    sys.exit(main())
