"""Linear, RMSNorm, Embedding and the gated MLP: the parts of a decoder that linearizing leaves alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lizard_jax.errors import UserError
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.params import BaseParam, LoraParam
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import partition

INIT_STD = 0.02


class Linear(nnx.Module):
    """``y = x W + b``, and with an adapter ``y = x W + b + scale (x A) B``.

    ``kernel`` is ``[in, out]``. ``lora_a [in, r]`` and ``lora_b [r, out]`` are None until ``lizard_jax.lora`` adds
    them; the adapter's term is formed in float32 and the sum rounded once to the dtype of ``x``.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernel = BaseParam(INIT_STD * jax.random.normal(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.data(BaseParam(jnp.zeros((outputs,), dtype)) if bias else None)
        self.lora_a: LoraParam | None = nnx.data(None)
        self.lora_b: LoraParam | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is None or self.lora_b is None:
            return y
        wide = accumulation_dtype(x)
        update = (x.astype(wide) @ self.lora_a[...].astype(wide)) @ self.lora_b[...].astype(wide)
        return (y.astype(wide) + self.lora_scale * update).astype(x.dtype)


class RMSNorm(nnx.Module):
    """``y = w x / sqrt(mean(x²) + ε)`` over the last axis, normalized in float32 whatever the dtype of ``x``."""

    def __init__(self, width: int, *, eps: float, dtype: DTypeLike):
        self.weight = BaseParam(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = x.astype(accumulation_dtype(x))
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight[...].astype(x.dtype)


class Embedding(nnx.Module):
    """One row of ``embedding [V, D]`` per token; tied models read logits from the same table."""

    def __init__(self, vocab_size: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embedding = BaseParam(INIT_STD * jax.random.normal(rngs.params(), (vocab_size, width), dtype))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return partition.by_tokens(jnp.take(self.embedding[...], tokens, axis=0))


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu_exact(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


# By the names transformers gives them in ``hidden_act``.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu_exact,
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": _quick_gelu,
    "gelu_python": _gelu_exact,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation transformers calls ``name``.

    Raises:
        UserError: it is none of those this project computes.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"hidden_act {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nnx.Module):
    """The gated feed-forward: ``y = (act(x W_gate) * x W_up) W_down``."""

    def __init__(
        self, width: int, inner: int, *, hidden_act: str, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.gate_proj = Linear(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(width, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, width, bias=bias, dtype=dtype, rngs=rngs)
        self.act = activation(hidden_act)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
