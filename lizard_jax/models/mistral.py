"""Mistral: Llama whose every layer may see only the last ``sliding_window`` tokens, and which has no biases."""

from flax import nnx
from jax.typing import DTypeLike

from lizard_jax.config import ModelConfig
from lizard_jax.errors import UserError
from lizard_jax.models.llama import Llama


class Mistral(Llama):
    """The window is ``config.sliding_window``, read by each layer's ``SoftmaxMixer``; None means no window.

    Raises:
        UserError: the configuration asks for biases or q/k norms, which this architecture has not.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = "float32", rngs: nnx.Rngs):
        if config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm:
            raise UserError("a mistral model has no biases and no q/k norms; use architecture=llama, qwen2 or qwen3")
        super().__init__(config, dtype=dtype, rngs=rngs)
