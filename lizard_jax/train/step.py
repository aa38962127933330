"""One training step and one evaluation as pure jitted functions over a mesh.

The model travels as three parts: its graph (static), the parameters the stage trains, and the frozen rest. The first
two parts' buffers are donated, the frozen ones are only read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lizard_jax import sharding
from lizard_jax.config import RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.models.llama import Llama
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.train import stages
from lizard_jax.train.optim import Optimizer, OptimizerState
from pallas_kernels import partition


@dataclass
class TrainState:
    """Everything of a run that lives on devices."""

    graph: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State
    optimizer: OptimizerState

    def model(self) -> nnx.Module:
        """The whole model, sharing these arrays."""
        return nnx.merge(self.graph, self.trainable, self.frozen)


def place(config: RunConfig, model: nnx.Module, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Split a model by what its stage trains, put the parts on the mesh, and start the optimizer there."""
    graph, trainable, frozen = nnx.split(model, stages.trainable(config), ...)
    trainable = sharding.put(trainable, sharding.state_shardings(trainable, mesh))
    frozen = sharding.put(frozen, sharding.state_shardings(frozen, mesh))
    shapes = jax.eval_shape(optimizer.init, trainable)
    start = jax.jit(optimizer.init, out_shardings=sharding.state_shardings(shapes, mesh))
    return TrainState(graph, trainable, frozen, start(trainable))


def train_step(config: RunConfig, optimizer: Optimizer, state: TrainState, mesh: Mesh) -> Callable[..., Any]:
    """``(trainable, optimizer state, frozen, batch) -> (trainable, optimizer state, metrics)``, jitted for the mesh.

    Metrics are the stage's, with ``grad_norm`` (before clipping) and ``learning_rate``; they come back replicated.
    Where loss or gradient is not finite, parameters and optimizer stay as they were.
    Trainable parameters and optimizer state are donated.
    """
    graph = state.graph

    def step(trainable: nnx.State, moments: OptimizerState, frozen: nnx.State, batch: Any) -> Any:
        with partition.over(sharding.kernel_partition(mesh)):
            grads, metrics = in_parts(config, nnx.merge(graph, trainable, frozen), batch)
        *new, info = optimizer.update(grads, moments, trainable)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(info["grad_norm"])
        trainable, moments = jax.tree.map(lambda a, b: jnp.where(sound, a, b), tuple(new), (trainable, moments))
        return trainable, moments, metrics | info

    places = [sharding.state_shardings(part, mesh) for part in (state.trainable, state.optimizer, state.frozen)]
    return jax.jit(
        step,
        donate_argnums=(0, 1),
        in_shardings=(*places, sharding.batch_sharding(mesh)),
        out_shardings=(places[0], places[1], sharding.replicated(mesh)),
        compiler_options=stages.compiler_options(config, mesh.devices.flat[0].platform),
    )


def in_parts(config: RunConfig, model: Llama, batch: Batch) -> tuple[nnx.State, dict[str, jax.Array]]:
    """``stages.loss_and_grads`` of a batch, computed in ``accumulate`` parts, each of rows of every device.

    Parts count by what they score, so that stages 0 and 2 have the whole batch's loss and gradients up to rounding. In
    stage 1 the errors of a part are relative to its own teacher's power.
    """
    parts = config.data.accumulate
    if parts == 1:
        return stages.loss_and_grads(config, model, batch)
    graph, state = nnx.split(model)

    def cut(a: jax.Array) -> jax.Array:
        devices = partition.row_parts(a.shape[0])
        rows = jnp.moveaxis(a.reshape(devices, parts, -1, *a.shape[1:]), 1, 0)
        return rows.reshape(parts, -1, *a.shape[1:])

    def add(total: tuple[Any, jax.Array], part: Batch) -> tuple[tuple[Any, jax.Array], None]:
        part = jax.tree.map(partition.by_rows, part)
        found, count = stages.loss_and_grads(config, nnx.merge(graph, state), part), stages.scored(config, part)
        sums = jax.tree.map(lambda t, a: t + a.astype(t.dtype) * count.astype(t.dtype), total[0], found)
        return (sums, total[1] + count), None

    pieces = jax.tree.map(lambda a: cut(jnp.asarray(a)), batch)
    one = jax.eval_shape(lambda: stages.loss_and_grads(config, model, jax.tree.map(lambda a: a[0], pieces)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, accumulation_dtype(s)), one)
    (sums, count), _ = jax.lax.scan(add, (zeros, jnp.float32(0)), pieces)
    return jax.tree.map(lambda a, s: (a / jnp.maximum(count, 1).astype(a.dtype)).astype(s.dtype), sums, one)


def eval_step(config: RunConfig, state: TrainState, mesh: Mesh) -> Callable[..., Any]:
    """``(trainable, frozen, batch) -> sums`` of ``stages.evaluate``, jitted for the mesh, replicated."""
    graph = state.graph

    def step(trainable: nnx.State, frozen: nnx.State, batch: Any) -> Any:
        with partition.over(sharding.kernel_partition(mesh)):
            return stages.evaluate(config, nnx.merge(graph, trainable, frozen), batch)

    places = [sharding.state_shardings(part, mesh) for part in (state.trainable, state.frozen)]
    return jax.jit(step, in_shardings=(*places, sharding.batch_sharding(mesh)), out_shardings=sharding.replicated(mesh))
