"""Low-rank adapters on the frozen projections: added for stage 2, merged or exported afterwards."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from lizard_jax.config import LoraConfig
from lizard_jax.errors import UserError
from lizard_jax.models.llama import Llama
from lizard_jax.nn.layers import Linear
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.params import BaseParam, LoraParam
from lizard_jax.typing import Array, Float

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(model: Llama) -> Iterator[tuple[str, Linear]]:
    """Every projection that may carry an adapter, with its name, layer by layer."""
    for block in model.layers:
        for name in TARGETS:
            yield name, getattr(block.attention if hasattr(block.attention, name) else block.mlp, name)


def add_lora(model: Llama, config: LoraConfig, rngs: nnx.Rngs) -> Llama:
    """Puts an adapter ``(alpha / r) A B`` on every target projection, in place, and returns the model.

    A starts uniform within ``±1/√in`` and B at zero, so the model's outputs do not change yet. Both are float32.

    Raises:
        UserError: a target that is no projection, a rank below 1, or adapters already there.
    """
    unknown = [name for name in config.targets if name not in TARGETS]
    if unknown or not config.targets:
        raise UserError(f"LoRA targets {', '.join(unknown) or '(none)'} are unknown; choose from {', '.join(TARGETS)}")
    if config.rank < 1:
        raise UserError(f"LoRA rank {config.rank} must be at least 1")
    if model.lora is not None:
        raise UserError("the model carries LoRA adapters already; merge them first")
    for name, linear in projections(model):
        if name in config.targets:
            inputs, outputs = linear.kernel.shape
            bound = inputs**-0.5
            linear.lora_a = LoraParam(
                jax.random.uniform(rngs.params(), (inputs, config.rank), jnp.float32, -bound, bound)
            )
            linear.lora_b = LoraParam(jnp.zeros((config.rank, outputs), jnp.float32))
            linear.lora_scale = config.alpha / config.rank
    model.lora = config
    return model


def merged_kernel(linear: Linear) -> Float[Array, "..."]:
    """``W + (alpha / r) A B``, formed in float32 (float64 for a float64 W) and rounded once to the dtype of W."""
    kernel = linear.kernel[...]
    if linear.lora_a is None or linear.lora_b is None:
        return kernel
    wide = accumulation_dtype(kernel)
    update = jnp.matmul(
        linear.lora_a[...].astype(wide), linear.lora_b[...].astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    return (kernel.astype(wide) + linear.lora_scale * update).astype(kernel.dtype)


def merge_lora(model: Llama) -> Llama:
    """Folds every adapter into its base weight, in place, and returns the model without adapters."""
    for _, linear in projections(model):
        linear.kernel = BaseParam(merged_kernel(linear))
        linear.lora_a = linear.lora_b = nnx.data(None)
        linear.lora_scale = 0.0
    model.lora = None
    return model
