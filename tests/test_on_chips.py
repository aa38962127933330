"""Whole training steps and generation, compiled for chips that are not here: the kernels are in them by themselves."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from benchmarks.chips.compilers import compile_for, tpu_slice
from lizard_jax import sharding
from lizard_jax.config import LizardConfig, ModelConfig, RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.generate import decode
from lizard_jax.generate.sampling import Sampling
from lizard_jax.lora import add_lora
from lizard_jax.models import build
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.plan import absent
from lizard_jax.train import stages
from lizard_jax.train.optim import Optimizer
from lizard_jax.train.step import TrainState, train_step
from pallas_kernels import partition

TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
GPU = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax_cuda13_plugin", "jax_triton")),
    reason="needs jax_cuda13_plugin, jax_triton",
)
ATTENTION = LizardConfig(window=64, feature_half=32)
MODEL = ModelConfig(
    architecture="llama", vocab_size=256, hidden_size=256, intermediate_size=256, num_layers=1, num_heads=4,
    kv_heads=2, head_dim=64, max_positions=512, attention=ATTENTION,
)  # fmt: skip
B, T = 4, 256


def model(stage: int = 1):
    """Shapes alone."""

    def make():
        made = build(MODEL, dtype="bfloat16", rngs=nnx.Rngs(0))
        return add_lora(made, RunConfig().lora, nnx.Rngs(0)) if stage == 2 else made

    return nnx.eval_shape(make)


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def step_and_arguments(stage: int, devices: np.ndarray):
    """A stage's training step over a mesh, and what it is called with."""
    config = RunConfig(stage=stage, dtype="bfloat16", attention=ATTENTION)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))
    graph, trainable, frozen = nnx.split(model(stage), stages.trainable(config), ...)
    optimizer = Optimizer(config.optim, 10)
    moments = jax.eval_shape(optimizer.init, trainable)
    step = train_step(config, optimizer, TrainState(graph, trainable, frozen, moments), mesh)
    batch = Batch(array(B, T), array(B, T), array(B, T), array(B, T, dtype=jnp.float32))
    return step, (trainable, moments, frozen, batch)


@TPU
@pytest.mark.parametrize(("stage", "shape"), [(1, (1, 4, 1, 1)), (2, (1, 2, 2, 1))])
def test_a_training_step_on_four_tpus_has_the_kernels_in_it(stage, shape):
    """Under ``shard_map``: a kernel that XLA had to split would not compile."""
    devices = tpu_slice("v5e")
    step, arguments = step_and_arguments(stage, np.array(devices).reshape(shape))
    with absent.compiling_for("tpu", "v5e", devices[0]) as platforms:
        compiled = step.trace(*arguments).lower(lowering_platforms=platforms).compile()
    calls = re.findall(r"%(\w+?)(?:\.\d+)* = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled.as_text())
    for kernel in ("log_gate_forward", "log_gate_states", "log_gate_backward", "window_forward", "splash_mha_fwd"):
        assert any(kernel in call for call in calls), calls
    # A window with real first tokens has nothing that stage 1 trains.
    assert any("window_backward" in call for call in calls) == (stage == 2)


@TPU
def test_a_row_that_no_mesh_divides_is_computed_on_every_device():
    """As key heads are chosen before a run, and one text is written: XLA splits no kernel, not even to repeat it."""
    devices = tpu_slice("v5e")
    mesh = Mesh(np.array(devices).reshape(1, 4, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    arrays = (
        jax.ShapeDtypeStruct((1, T, *width), jnp.bfloat16, sharding=sharding.replicated(mesh))
        for width in ((256,), (4, 64), (2, 64), (2, 64))
    )
    mixer = SoftmaxMixer(MODEL, 0)
    with (
        absent.compiling_for("tpu", "v5e", devices[0]) as platforms,
        partition.over(sharding.kernel_partition(mesh)),
    ):
        traced = jax.jit(lambda x, q, k, v: mixer(x, q, k, v)).trace(*arrays)
        compiled = traced.lower(lowering_platforms=platforms).compile()
    assert "splash_mha_fwd" in compiled.as_text()


@GPU
def test_gradients_on_a_gpu_have_the_kernels_in_them():
    config = RunConfig(stage=2, dtype="bfloat16", attention=ATTENTION)
    graph, trainable, frozen = nnx.split(model(stage=2), stages.trainable(config), ...)

    def grads(trainable, frozen, *batch):
        return stages.loss_and_grads(config, nnx.merge(graph, trainable, frozen), Batch(*batch))

    tokens = array(B, T), array(B, T), array(B, T), array(B, T, dtype=jnp.float32)
    names = {kernel.name for kernel in compile_for("sm_90", grads, trainable, frozen, *tokens).kernels}
    assert names >= {"decays_kernel", "states_kernel", "rows_kernel", "cotangents_kernel", "keys_kernel"}
    assert names & {"outputs_kernel", "fused_mapped_kernel"}
    assert names >= {"window_forward", "window_query_gradient", "window_key_gradient"}


@pytest.mark.parametrize("chip", [pytest.param("v5e", marks=TPU), pytest.param("sm_90", marks=GPU)])
def test_a_prompt_is_read_by_kernels_and_tokens_are_written(chip):
    student = model()
    state = jax.eval_shape(lambda: student.init_state(B))
    read = functools.partial(decode._read.__wrapped__)
    kernels = compile_for(chip, read, student, array(B, T), state, array(B, 256, dtype=jnp.bfloat16), array(B)).kernels
    names = {kernel.name for kernel in kernels}
    assert names >= {"window_forward"}
    assert names & {"log_gate_forward", "outputs_kernel", "fused_mapped_kernel"}

    carry = decode.Carry(state, array(B), array(B), array(B), array(B, dtype=jnp.bool_), None)
    write = functools.partial(decode._write.__wrapped__, sampling=Sampling(), stops=(0,))
    compile_for(chip, write, student, carry, array())
