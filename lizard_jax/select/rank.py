"""Scores of a teacher's key heads: what they retrieve, and what is lost where one alone is cut to its window.

Everything runs block by block through one compiled function, whatever heads are kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lizard_jax.config import LizardConfig, ModelConfig
from lizard_jax.models.llama import Block, Llama
from lizard_jax.nn.lizard_attention import LizardMixer
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.rope import cos_sin, inverse_frequencies, rotate
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.select.needles import Needles
from lizard_jax.typing import Array, Bool, Float, Int

Tick = Callable[[int], Any]
PROBED = 256
"""Positions of a text at which predictions are compared, evenly spread behind the window."""


def silent(_: int) -> None:
    """The tick of nobody watching."""


def retrieval_scores(teacher: Llama, texts: Needles, *, tick: Tick = silent) -> Float[np.ndarray, "L K"]:
    """How much each key head looks from an answer to where it is hidden.

    Attention of the positions that write the answer to the hidden answer's tokens, as a mean over texts, positions and
    the key head's query heads.

    Args:
        tick: called after each text with 1.
    """
    config = teacher.config
    # A function of this call alone: JAX keeps what it traced by the function, and elsewhere the mesh is another.
    looks = jax.jit(lambda *arrays, **kinds: _looks(*arrays, **kinds), static_argnames=("config", "layer"))
    total = np.zeros((config.num_layers, config.num_heads))
    for i in range(len(texts.tokens)):
        arrays = (jnp.asarray(a[i : i + 1]) for a in (texts.rows, texts.real, texts.hidden))
        rows, real, hidden = arrays
        x = teacher.embed(jnp.asarray(texts.tokens[i : i + 1]))
        found = []
        for layer, block in enumerate(teacher.layers):
            seen, x = looks(block, x, rows, real, hidden, config=config, layer=like(config, layer))
            found.append(seen)
        total += np.asarray(jnp.stack(found), np.float64)
        tick(1)
    group = config.num_heads // config.kv_heads
    return (total / len(texts.tokens)).reshape(config.num_layers, config.kv_heads, group).mean(axis=-1)


def cut_losses(
    teacher: Llama, texts: Sequence[Int[np.ndarray, " T"]], *, window: int, prefix: int = 4, tick: Tick = silent
) -> Float[np.ndarray, "L K"]:
    """KL to the teacher's predictions (nats) where one key head alone sees its window and the first tokens.

    Args:
        texts: token ids, all of one length beyond the window.
        tick: called after each head with 1.
    """
    config = teacher.config
    total = np.zeros((config.num_layers, config.kv_heads))
    for ids in texts:
        at = jnp.asarray(np.linspace(window, len(ids) - 1, min(PROBED, len(ids) - window)).astype(np.int32))[None]
        states = [teacher.embed(jnp.asarray(ids[None]))]
        everything = jnp.ones((config.kv_heads,), jnp.bool_)
        for layer, block in enumerate(teacher.layers):
            states.append(_kept(block, states[-1], everything, config, layer, window, prefix))
        target = _predictions(teacher, states[-1], at)
        for layer in range(config.num_layers):
            for head in range(config.kv_heads):
                x = _kept(
                    teacher.layers[layer], states[layer], everything.at[head].set(False), config, layer, window, prefix
                )
                for later in range(layer + 1, config.num_layers):
                    x = _kept(teacher.layers[later], x, everything, config, later, window, prefix)
                total[layer, head] += float(_divergence(target, _predictions(teacher, x, at)))
                tick(1)
    return total / len(texts)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a choice of heads keeps.

    Attributes:
        needles: the share of texts whose whole answer is the most likely one, token by token.
        answer_loss: nats a token of the answers.
        loss: nats a token of plain text behind the window; None where there was none.
    """

    needles: float
    answer_loss: float
    loss: float | None


def score(
    teacher: Llama,
    keep: Bool[np.ndarray, "L K"],
    texts: Needles,
    plain: Sequence[Int[np.ndarray, " T"]] = (),
    *,
    window: int,
    prefix: int = 4,
    tick: Tick = silent,
) -> Found:
    """The untrained student whose heads of ``keep`` see everything and whose others their window and the first tokens.

    Args:
        plain: token ids, all of one length.
        tick: called after each text with 1.
    """

    def hidden(ids: Int[np.ndarray, " T"]) -> Array:
        x = teacher.embed(jnp.asarray(ids[None]))
        for layer, block in enumerate(teacher.layers):
            x = _kept(block, x, jnp.asarray(keep[layer]), teacher.config, layer, window, prefix)
        return x

    right, nats, count = 0, 0.0, 0
    for i in range(len(texts.tokens)):
        log = np.asarray(_predictions(teacher, hidden(texts.tokens[i]), jnp.asarray(texts.rows[i : i + 1])))[0]
        real, answer = texts.real[i], texts.answers[i]
        right += bool((log.argmax(axis=-1) == answer)[real].all())
        nats -= float(log[np.arange(len(answer)), answer][real].sum())
        count += int(real.sum())
        tick(1)
    losses = []
    for ids in plain:
        losses.append(float(loss_behind(teacher, teacher.norm(hidden(ids)), jnp.asarray(ids), window)))
        tick(1)
    return Found(right / len(texts.tokens), nats / count, float(np.mean(losses)) if losses else None)


def like(config: ModelConfig, layer: int) -> int:
    """The first layer whose attention is of the same kind, so that one compiled function serves them all."""
    slides = config.sliding_window_layers
    return 0 if slides is None else next(i for i in range(layer + 1) if (i in slides) == (layer in slides))


def _looks(
    block: Block,
    x: Float[Array, "B T D"],
    rows: Int[Array, "B A"],
    real: Bool[Array, "B A"],
    hidden: Bool[Array, "B T"],
    *,
    config: ModelConfig,
    layer: int,
) -> tuple[Float[Array, " N"], Float[Array, "B T D"]]:
    normed = block.attention_norm(x)
    q, k, v = block.attention.qkv(normed)
    mixer = SoftmaxMixer(config, layer)
    time, group = q.shape[1], config.num_heads // config.kv_heads
    index = jnp.arange(time, dtype=jnp.int32)[None]
    cos, sin = cos_sin(inverse_frequencies(config.rope, config.head_dim, length=time), index)
    wide = accumulation_dtype(q)
    asking = jnp.take_along_axis(rotate(q, cos, sin), rows[..., None, None], axis=1).astype(wide)
    keys = jnp.repeat(rotate(k, cos, sin), group, axis=2).astype(wide)
    scores = jnp.einsum("banh,btnh->bant", asking, keys) * config.head_dim**-0.5
    seen = index[:, None] <= rows[..., None]
    if mixer.window is not None:
        seen &= index[:, None] > rows[..., None] - mixer.window
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], scores, -jnp.inf), axis=-1)
    mass = jnp.where(hidden[:, None, None], weights, 0.0).sum(axis=-1)  # [B, A, N]
    mean = jnp.where(real[..., None], mass, 0.0).sum((0, 1)) / real.sum().astype(wide)
    return mean, block.after_heads(x, mixer(normed, q, k, v))


def _kept(
    block: Block, x: Array, keep: Bool[Array, " K"], config: ModelConfig, layer: int, window: int, prefix: int
) -> Array:
    return _block(block, x, keep, config=config, layer=like(config, layer), window=window, prefix=prefix)


@functools.partial(jax.jit, static_argnames=("config", "layer", "window", "prefix"))
def _block(
    block: Block, x: Float[Array, "B T D"], keep: Bool[Array, " K"], *, config: ModelConfig, layer: int, window: int,
    prefix: int,
) -> Float[Array, "B T D"]:  # fmt: skip
    """A block whose key heads of ``keep`` see everything, and the others their window and the first tokens."""
    normed = block.attention_norm(x)
    q, k, v = block.attention.qkv(normed)
    short = LizardConfig(memory="none", meta="prefix", meta_tokens=prefix, window=window)
    near = LizardMixer(dataclasses.replace(config, attention=short), rngs=nnx.Rngs(0))(normed, q, k, v)
    whole = SoftmaxMixer(config, layer)(normed, q, k, v)
    heads = jnp.where(jnp.repeat(keep, config.num_heads // config.kv_heads)[:, None], whole, near)
    return block.after_heads(x, heads)


@jax.jit
def _predictions(model: Llama, x: Float[Array, "B T D"], at: Int[Array, "B A"]) -> Float[Array, "B A V"]:
    """Log-probabilities of what follows these positions."""
    chosen = jnp.take_along_axis(model.norm(x), at[..., None], axis=1)
    return jax.nn.log_softmax(model.logits(chosen))


@jax.jit
def _divergence(target: Float[Array, "B A V"], log: Float[Array, "B A V"]) -> Float[Array, ""]:
    return (jnp.exp(target) * (target - log)).sum(axis=-1).mean()


@functools.partial(jax.jit, static_argnames=("window",))
def loss_behind(model: Llama, x: Float[Array, "1 T D"], ids: Int[Array, " T"], window: int) -> Float[Array, ""]:
    """Nats a token of what stands behind the window, in slices so that not every logit lives at once.

    Args:
        x: what the head reads, as ``model.hidden`` gives it: behind the last norm.
    """
    hidden, targets = x[0, window:-1], ids[window + 1 :]
    size = 256
    padding = -len(targets) % size
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[-1])
    rows = jnp.pad(targets, (0, padding), constant_values=-1).reshape(-1, size)

    def part(pair):
        log = jax.nn.log_softmax(model.logits(pair[0][None])[0])
        return jnp.where(pair[1] >= 0, -jnp.take_along_axis(log, jnp.maximum(pair[1], 0)[:, None], 1)[:, 0], 0.0).sum()

    return jax.lax.map(part, (hidden, rows)).sum() / len(targets)
