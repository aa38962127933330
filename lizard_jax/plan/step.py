"""The real step of a run, compiled for devices that are not here; no weight is ever allocated."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from lizard_jax import sharding
from lizard_jax.config import ModelConfig, RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.lora import add_lora
from lizard_jax.models import build
from lizard_jax.plan import absent
from lizard_jax.plan.flops import matmul_flops
from lizard_jax.plan.program import Moved, moved
from lizard_jax.train import stages
from lizard_jax.train.optim import Optimizer
from lizard_jax.train.step import TrainState, train_step
from pallas_kernels import target
from pallas_kernels.chips import Chip


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes of one device between steps.

    Attributes:
        frozen, trained: parameters.
        optimizer: its moments and copies.
        batch: the next one.
    """

    frozen: int
    trained: int
    optimizer: int
    batch: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.frozen + self.trained + self.optimizer + self.batch


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step, of one device.

    Attributes:
        temporaries, code: bytes that it needs beside ``Parts``.
        moved: what it moves.
        tracing: seconds of the processor until there was a program to compile, of all threads.
        compiling: seconds of the processor that compiling it took: what a kept program saves.
    """

    temporaries: int
    code: int
    moved: Moved
    tracing: float
    compiling: float


def state_of(config: RunConfig, shape: ModelConfig) -> TrainState:
    """The shapes of everything that lives on devices."""

    def make() -> nnx.Module:
        model = build(shape, dtype=config.dtype, rngs=nnx.Rngs(0))
        if config.stage == 2 and not config.full:
            add_lora(model, config.lora, nnx.Rngs(0))
        return model

    graph, trainable, frozen = nnx.split(nnx.eval_shape(make), stages.trainable(config), ...)
    return TrainState(graph, trainable, frozen, jax.eval_shape(Optimizer(config.optim, 10).init, trainable))


def batch_of(config: RunConfig) -> Batch:
    """The shapes of a batch."""
    rows = (config.data.batch_size, config.data.sequence_length)
    whole, real = (jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.int32, jnp.float32))
    return Batch(whole, whole, whole, real)  # type: ignore[arg-type]


def mesh_over(devices: tuple[Any, ...], shape: tuple[int, ...]) -> Mesh:
    """A mesh of these devices, as ``sharding.make_mesh`` makes one of those that are here."""
    return Mesh(np.asarray(devices).reshape(shape), sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def parts(config: RunConfig, shape: ModelConfig, mesh: Mesh) -> Parts:
    """What a device holds between steps, by the table of ``sharding``."""
    state = state_of(config, shape)

    def held(tree: Any, places: Any) -> int:
        leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
        return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves)

    frozen, trained, optimizer = (
        held(tree, sharding.state_shardings(tree, mesh)) for tree in (state.frozen, state.trainable, state.optimizer)
    )
    batch = batch_of(config)
    return Parts(frozen, trained, optimizer, held(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch)))


def compiled(config: RunConfig, shape: ModelConfig, chip: Chip, mesh: Mesh) -> Step:
    """The step of a run, compiled for a mesh of a chip's devices."""
    optimizer, state = Optimizer(config.optim, 10), state_of(config, shape)
    device = mesh.devices.flat[0]
    began = time.process_time()
    with absent.compiling_for(chip.platform, chip.target, device) as platforms, _quiet():
        step: Any = train_step(config, optimizer, state, mesh)
        traced = step.trace(state.trainable, state.optimizer, state.frozen, batch_of(config))
        lowered = traced.lower(lowering_platforms=platforms)
        between = time.process_time()
        program = lowered.compile()
    tracing, compiling = between - began, time.process_time() - between
    memory = program.memory_analysis()
    assert memory is not None
    temporaries = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = program.as_text() or ""
    found = moved(text, mesh.devices.size)
    return Step(temporaries, memory.generated_code_size_in_bytes, found, tracing, compiling)


def flops(config: RunConfig, shape: ModelConfig) -> int:
    """FLOPs of a step's matmuls, over all devices: the linear branch's as its plain chunked form has them, those of
    softmax over three quarters of all pairs of tokens."""
    state = state_of(config, shape)

    def run(trainable: nnx.State, frozen: nnx.State, batch: Batch) -> Any:
        return stages.loss_and_grads(config, nnx.merge(state.graph, trainable, frozen), batch)

    # Kernels hide what they do, and a CPU's softmax goes over blocks in loops of no fixed length.
    with target.override(target.Target("accelerator")):
        return matmul_flops(run, state.trainable, state.frozen, batch_of(config))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that Pallas' Triton backend is to go: it is chosen knowingly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield
