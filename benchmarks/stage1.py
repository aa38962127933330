"""What stage 1 costs: its step against one forward of the teacher, and its memory against depth.

    python benchmarks/stage1.py

Time: gradients of all layers' errors beside one teacher forward (no logits on either side), Llama-3.2-1B's layer shape,
fp32, in one process, measured in turns; medians. Memory: temporary bytes of the compiled step, less the bytes of the
new parameters' gradients, at 4 and at 16 layers.
Writes ``benchmarks/stage1.json``. The last block's MLP feeds nothing in stage 1 and is not run there.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import in_turns
from lizard_jax.config import LizardConfig, ModelConfig, RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.models import build
from lizard_jax.nn.params import NewParam
from lizard_jax.train import stages

HERE = Path(__file__).resolve().parent


def decoder(width: int, layers: int, window: int) -> ModelConfig:
    """Llama-3.2-1B's proportions: heads of 64, four query heads to a key head, an MLP four times the width."""
    heads = width // 64
    return ModelConfig(
        architecture="llama", vocab_size=1024, hidden_size=width, intermediate_size=4 * width, num_layers=layers,
        num_heads=heads, kv_heads=heads // 4, head_dim=64, max_positions=8192, attention=LizardConfig(window=window),
    )  # fmt: skip


def batch_of(rows: int, length: int) -> Batch:
    """Random tokens, one document a row."""
    tokens = np.random.default_rng(0).integers(0, 1024, (rows, length)).astype(np.int32)
    ones = np.ones((rows, length), np.int32)
    return Batch(inputs=tokens, targets=tokens, segment_ids=ones, loss_mask=ones.astype(np.float32))


def step_against_forward(width: int, length: int, layers: int, repeats: int) -> dict[str, float]:
    """Seconds of the stage-1 gradients and of the teacher's forward, and their ratio."""
    model = build(decoder(width, layers, window=128), rngs=nnx.Rngs(0))
    batch = batch_of(1, length)
    run = RunConfig(stage=1)
    options = stages.compiler_options(run, jax.default_backend())
    step = jax.jit(lambda model, batch: stages.loss_and_grads(run, model, batch), compiler_options=options)
    forward = jax.jit(lambda model, batch: model.hidden(batch.inputs))
    teacher = stages.teacher_of(model)
    calls = {"stage1_step": lambda: step(model, batch), "forward": lambda: forward(teacher, batch)}
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = {name: float(np.median(times)) for name, times in in_turns(calls, repeats).items()}
    return seconds | {"ratio": seconds["stage1_step"] / seconds["forward"]}


def temporary_bytes(width: int, length: int, layers: int) -> dict[str, int]:
    """Peak temporary memory of the compiled step, and what the new parameters' gradients take of it."""
    config = decoder(width, layers, window=128)
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    run = RunConfig(stage=1)

    def step(params: nnx.State, batch: Batch) -> object:
        return stages.loss_and_grads(run, nnx.merge(graph, params), batch)

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.asarray(x).dtype), batch_of(2, length))
    compiled = jax.jit(step, compiler_options=stages.compiler_options(run, jax.default_backend()))
    memory = compiled.lower(params, abstract).compile().memory_analysis()
    assert memory is not None
    grads = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model, NewParam)))
    # The gradients leave the step as outputs, which are not counted among the temporaries.
    return {"temporary": memory.temp_size_in_bytes, "gradients": grads, "outputs": memory.output_size_in_bytes}


def main() -> None:
    """Measure, print and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    speed = step_against_forward(arguments.width, arguments.length, 2, arguments.repeats)
    print(f"D={arguments.width} T={arguments.length}, 2 layers: {speed}")
    memory = {layers: temporary_bytes(512, 1024, layers) for layers in (4, 16)}
    growth = memory[16]["temporary"] / memory[4]["temporary"] - 1
    print(f"temporary memory D=512 T=1024 B=2: {memory}, growth from 4 to 16 layers {100 * growth:+.1f}%")
    result = {
        "device": jax.devices()[0].device_kind,
        "speed": speed | vars(arguments),
        "memory": memory,
        "growth": growth,
    }
    (HERE / "stage1.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
