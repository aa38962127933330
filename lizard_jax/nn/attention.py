"""One attention layer: the teacher's projections around whichever mixer the configuration chooses."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lizard_jax.config import ModelConfig
from lizard_jax.nn.head_sets import of_heads
from lizard_jax.nn.layers import Linear, RMSNorm
from lizard_jax.nn.lizard_attention import LizardMixer
from lizard_jax.nn.rope import query_scale
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.nn.split_attention import SplitMixer, classes, ring_of
from lizard_jax.typing import Array, Float, Int


def mixer_of(config: ModelConfig, layer_index: int, *, rngs: nnx.Rngs) -> SoftmaxMixer | LizardMixer | SplitMixer:
    """A fresh mixer of a layer, as its configuration says."""
    if config.attention is None or layer_index in config.attention.softmax_layers:
        return SoftmaxMixer(config, layer_index)
    exact = config.attention.exact_heads(layer_index)
    if len(exact) == config.kv_heads:
        reach = config.attention.retrieval_window
        return (
            LizardMixer(ring_of(config, len(exact), layer_index), rngs=rngs)
            if reach
            else SoftmaxMixer(config, layer_index)
        )
    found = classes(config, layer_index)
    if exact or len(found) > 1:
        return SplitMixer(config, layer_index, rngs=rngs)
    ((window, kept),) = found
    return LizardMixer(of_heads(config, config.kv_heads, window=window, kept=kept), rngs=rngs)


class Attention(nnx.Module):
    """Projects x to q, k, v, lets ``mixer`` turn them into head outputs, and projects those back to the width.

    The mixer is ``SoftmaxMixer`` where ``config.attention`` is None or keeps the whole layer, ``SplitMixer`` where its
    key heads are of several classes (``softmax_heads``, ``budgets``), and ``LizardMixer`` elsewhere. Each has
    ``__call__(x, q, k, v, *, segment_ids) -> heads``, ``init_state(batch, max_length, dtype)`` and ``extend(x, q, k, v,
    state, lengths) -> (heads, state)``.
    """

    def __init__(self, config: ModelConfig, layer_index: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.kv_heads, config.head_dim
        self.head_dim = head_dim
        self.query_scale = query_scale(config.rope)
        self.q_proj = Linear(width, heads * head_dim, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(width, kv_heads * head_dim, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(width, kv_heads * head_dim, bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(heads * head_dim, width, bias=config.o_bias, dtype=dtype, rngs=rngs)
        self.q_norm = nnx.data(RMSNorm(head_dim, eps=config.norm_eps, dtype=dtype) if config.qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(head_dim, eps=config.norm_eps, dtype=dtype) if config.qk_norm else None)
        self.mixer = mixer_of(config, layer_index, rngs=rngs)

    def qkv(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values, not yet rotated; q and k normalized where the architecture does so.

        Queries carry the temperature of ``yarn`` already, for every branch that reads them.
        """
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).reshape(batch, length, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q if self.query_scale == 1.0 else q * self.query_scale, k, v

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        return self.output(self.mixer(x, *self.qkv(x), segment_ids=segment_ids))

    def output(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The output projection of the head outputs."""
        return self.o_proj(jnp.reshape(heads, (*heads.shape[:2], -1)))

    def init_state(self, batch: int, max_length: int | None = None) -> Any:
        """The mixer's empty state; ``max_length`` is needed by softmax attention only."""
        return self.mixer.init_state(batch, max_length, self.k_proj.kernel.dtype)

    def extend(
        self, x: Float[Array, "B T D"], state: Any, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Each row's first ``lengths`` tokens after those the state has seen; the rest are padding."""
        heads, state = self.mixer.extend(x, *self.qkv(x), state, lengths)
        return self.output(heads), state
