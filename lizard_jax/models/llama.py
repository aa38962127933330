"""The Llama decoder: blocks and the language model. Mistral and Qwen differ by what their configuration says."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lizard_jax.config import LoraConfig, ModelConfig
from lizard_jax.nn.attention import Attention
from lizard_jax.nn.layers import MLP, Embedding, Linear, RMSNorm
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.typing import Array, Float, Int
from pallas_kernels import partition


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: ModelConfig, layer_index: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.hidden_size
        self.attention_norm = RMSNorm(width, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, layer_index, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(width, eps=config.norm_eps, dtype=dtype)
        self.mlp = MLP(
            width, config.intermediate_size, hidden_act=config.hidden_act, bias=config.mlp_bias, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T D"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        x = partition.by_tokens(x + self.attention(self.attention_norm(x), segment_ids=segment_ids))
        return partition.by_tokens(x + self.mlp(self.mlp_norm(x)))

    def after_heads(self, x: Float[Array, "B T D"], heads: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """The block's output for given head outputs of its attention (stage 1 supplies the teacher's)."""
        x = partition.by_tokens(x + self.attention.output(heads))
        return partition.by_tokens(x + self.mlp(self.mlp_norm(x)))

    def extend(
        self, x: Float[Array, "B T D"], state: Any, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Each row's first ``lengths`` tokens after those the state has seen; the rest are padding."""
        heads, state = self.attention.extend(self.attention_norm(x), state, lengths)
        x = x + heads
        return x + self.mlp(self.mlp_norm(x)), state


def logits_of(hidden: Float[Array, "B T D"], head: Float[Array, "D V"]) -> Float[Array, "B T V"]:
    """Float32 logits of final hidden states (float64 of float64 ones)."""
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=accumulation_dtype(hidden))


class Llama(nnx.Module):
    """A decoder language model: embedding, blocks, final norm, and a head that may share the embedding's table.

    Base weights start as normal(0.02), norms as ones, in ``dtype``, which activations take as well. Built under
    ``nnx.eval_shape`` it costs nothing and holds shapes only.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.lora: LoraConfig | None = None  # set by lizard_jax.lora, which puts the adapters on the projections
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.lm_head = nnx.data(
            None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the next token at every position."""
        return self.logits(self.hidden(tokens, segment_ids=segment_ids))

    def hidden(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None, remat: bool = False
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm; ``remat`` recomputes each block in the backward pass."""

        def run(block: Block, x: Array, segment_ids: Array | None) -> Array:
            return block(x, segment_ids=segment_ids)

        if remat:
            run = jax.checkpoint(run)
        x = self.embed(tokens)
        for block in self.layers:
            x = run(block, x, segment_ids)
        return self.norm(x)

    def head(self) -> Float[Array, "D V"]:
        """What makes logits of hidden states."""
        return self.embed.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Float32 logits of final hidden states (float64 for a float64 model)."""
        return logits_of(hidden, self.head())

    def init_state(self, batch: int, max_length: int | None = None) -> tuple[Any, ...]:
        """Empty decode states, one a layer; layers with softmax attention need ``max_length``."""
        return tuple(block.attention.init_state(batch, max_length) for block in self.layers)

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's decode state after ``length`` tokens, in the dtype of the weights."""
        shapes = jax.eval_shape(lambda: self.init_state(1, length))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    def extend(
        self, tokens: Int[Array, "B T"], state: tuple[Any, ...], lengths: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T V"], tuple[Any, ...]]:
        """Logits of T more tokens after those the state has seen, and the state after them; any T ≥ 1."""
        hidden, state = self.extend_hidden(tokens, state, lengths)
        return self.logits(hidden), state

    def extend_hidden(
        self, tokens: Int[Array, "B T"], state: tuple[Any, ...], lengths: Int[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """The final hidden states of ``extend``, where not every position's logits are wanted.

        Args:
            lengths: how many tokens of each row are real, from its start; the rest are padding, which leaves no trace
                in the state and whose outputs mean nothing. None: all of them.
        """
        if lengths is None:
            lengths = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        x = self.embed(tokens)
        after = []
        for block, layer_state in zip(self.layers, state, strict=True):
            x, layer_state = block.extend(x, layer_state, lengths)
            after.append(layer_state)
        return self.norm(x), tuple(after)
