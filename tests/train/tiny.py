"""A minute model and random batches: what the tests of the loop train."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from lizard_jax.config import DataConfig, LizardConfig, LoraConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.lora import add_lora
from lizard_jax.models import build
from lizard_jax.sharding import AXES

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=64,
)
ATTENTION = LizardConfig(window=8, chunk=8)


def run_config(stage: int = 1, **changes) -> RunConfig:
    """A stage's settings over 8 rows of 32 tokens and four steps, with some changed."""
    defaults = {
        "stage": stage,
        "attention": ATTENTION,
        "data": DataConfig(sequence_length=32, batch_size=8, held_out_tokens=512),
        "optim": OptimConfig(learning_rate=1e-2),
        "steps": 4,
    }
    return RunConfig(**{**defaults, **changes})


def make_model(config: RunConfig, shape: ModelConfig = MODEL):
    """The model a stage starts from, in the run's dtype throughout."""
    attention = None if config.stage == 0 else config.attention
    model = build(dataclasses.replace(shape, attention=attention), dtype=config.dtype, rngs=nnx.Rngs(3))
    if config.stage == 2 and not config.full:
        add_lora(model, LoraConfig(rank=2), nnx.Rngs(5))
    if config.dtype == "float64":
        nnx.update(model, jax.tree.map(lambda a: a.astype("float64"), nnx.state(model)))
    return model


class RandomBatches:
    """Tokens that depend on the step alone, two documents a row and a little padding."""

    def __init__(self, config: DataConfig, vocab_size: int = MODEL.vocab_size) -> None:
        self.config, self.vocab_size = config, vocab_size

    def batch(self, step: int) -> Batch:
        shape = (self.config.batch_size, self.config.sequence_length)
        tokens = np.random.default_rng([7, step]).integers(0, self.vocab_size, (shape[0], shape[1] + 1), np.int32)
        segments = np.ones(shape, np.int32)
        segments[:, shape[1] // 3 :] = 2
        segments[0, -3:] = 0
        return Batch(tokens[:, :-1], tokens[:, 1:], segments, (segments > 0).astype(np.float32))

    def held_out(self) -> list[Batch]:
        return [self.batch(10_000), self.batch(10_001)]


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1, seq: int = 1):
    """A mesh over the first devices, as many as the axes need."""
    count = data * fsdp * tensor * seq
    axes = (jax.sharding.AxisType.Auto,) * 4
    return jax.make_mesh((data, fsdp, tensor, seq), AXES, axes, devices=jax.devices()[:count])


__all__ = ["ATTENTION", "MODEL", "MeshConfig", "RandomBatches", "make_model", "mesh_of", "run_config"]
