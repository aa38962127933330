"""What each stage trains and by which loss.

====== =================================== ==============================================================
stage  trains                              loss
====== =================================== ==============================================================
0      every weight of a softmax decoder   next-token cross-entropy
1      the new attention modules           per layer, MSE of head outputs relative to the teacher's mean square
2      LoRA on q, k, v; the new modules    KL to the teacher's predictions and next-token cross-entropy
====== =================================== ==============================================================
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lizard_jax.config import RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.losses import cross_entropy, frozen_head_loss, head_error, head_power, prediction_losses
from lizard_jax.models import build
from lizard_jax.models.llama import Llama
from lizard_jax.nn import reuse
from lizard_jax.nn.numerics import accumulation_dtype
from lizard_jax.nn.params import BaseParam, LoraParam, NewParam
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.nn.split_attention import learner_of, students_of, taught_heads
from lizard_jax.typing import Array


def trainable(config: RunConfig) -> Any:
    """The nnx filter of the parameters this run trains."""
    if trains_head(config):
        return nnx.Param
    if config.stage == 1:
        return NewParam
    return nnx.Any(LoraParam, NewParam) if config.train_new else LoraParam


def compiler_options(config: RunConfig, platform: str) -> dict[str, Any] | None:
    """What the stage's step is compiled with for a platform.

    The CPU compiler orders work for parallelism by default, and in stage 1 then keeps every layer's activations; the
    other order costs no time there.
    """
    if config.stage == 1 and platform == "cpu":
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return None


def teacher_of(model: Llama) -> Llama:
    """The softmax decoder inside a linearized one: its base weights, without LoRA and without the new modules."""
    config = dataclasses.replace(model.config, attention=None)
    abstract = nnx.eval_shape(lambda: build(config, dtype=model.embed.embedding.dtype, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(abstract), nnx.state(model, BaseParam))


def _arrays(batch: Batch) -> tuple[Array, Array, Array, Array]:
    """inputs, targets, segment ids, loss mask."""
    return (
        jnp.asarray(batch.inputs),
        jnp.asarray(batch.targets),
        jnp.asarray(batch.segment_ids),
        jnp.asarray(batch.loss_mask),
    )


@reuse.scope()
def loss_and_grads(config: RunConfig, model: Llama, batch: Batch) -> tuple[nnx.State, dict[str, Array]]:
    """Gradients of the stage's loss over its trainable parameters, and the step's metrics.

    Returns:
        The gradients, shaped as ``nnx.state(model, trainable(config))``, and ``loss`` (fp32 scalar: nats a token, or
        the mean over layers of the relative error), with ``layer_mse[L]`` beside it in stage 1 and, where the loss has
        both parts, ``nll`` and ``kl`` in stage 2.
    """
    if config.stage == 1:
        return _distil(model, batch)
    graph, train, rest = nnx.split(model, trainable(config), ...)
    inputs, targets, segments, mask = _arrays(batch)
    share = kl_share(config)
    # The teacher is the frozen base of the same weights: it costs a forward pass and no memory of its own.
    taught = teacher_of(model).hidden(inputs, segment_ids=segments) if share else None

    def loss(params: nnx.State) -> tuple[Array, dict[str, Array]]:
        whole = nnx.merge(graph, params, rest)
        hidden = whole.hidden(inputs, segment_ids=segments, remat=config.remat)
        if trains_head(config):
            count = jnp.maximum(mask.sum().astype(accumulation_dtype(hidden)), 1.0)
            return cross_entropy(whole, hidden, targets, mask) / count, {}
        value, (nll, kl) = frozen_head_loss(whole, hidden, targets, mask, taught, kl_share=share)
        return value, {"nll": nll, "kl": kl} if share else {}

    (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(train)
    return grads, {"loss": value, **parts}


def scored(config: RunConfig, batch: Batch) -> Array:
    """How many positions of a batch its loss is a mean over, fp32: real ones in stage 1, else those of the mask."""
    _, _, segments, mask = _arrays(batch)
    return (segments != 0).sum().astype(jnp.float32) if config.stage == 1 else mask.sum().astype(jnp.float32)


def trains_head(config: RunConfig) -> bool:
    """Whether every weight moves, the head's as well, so that no teacher is inside."""
    return config.stage == 0 or (config.stage == 2 and config.full)


def kl_share(config: RunConfig) -> float:
    """The KL's share of the loss: 0 where no teacher is inside, and in stage 1, which has another loss."""
    return 0.0 if config.stage != 2 or trains_head(config) else config.kl


def _distil(model: Llama, batch: Batch) -> tuple[nnx.State, dict[str, Array]]:
    """Stage 1. The teacher runs once; every layer's student sees the teacher's hidden state and is differentiated on
    the spot, so that one layer's activations are all that lives at a time."""
    grads = jax.tree.map(jnp.zeros_like, nnx.state(model, NewParam))
    layers = sum(bool(students_of(block.attention.mixer)) for block in model.layers)
    errors = []
    inputs, _, segments, _ = _arrays(batch)
    x = model.embed(inputs)
    loss = jnp.zeros((), accumulation_dtype(x))
    for index, block in enumerate(model.layers):
        mixer, normed = block.attention.mixer, block.attention_norm(x)
        q, k, v = block.attention.qkv(normed)
        teacher_heads = SoftmaxMixer(model.config, index)(normed, q, k, v, segment_ids=segments)
        mean = jnp.zeros((), accumulation_dtype(teacher_heads))
        if not isinstance(mixer, SoftmaxMixer) and students_of(mixer):
            target = taught_heads(mixer, teacher_heads)
            graph, new, rest = nnx.split(mixer, NewParam, ...)

            def error(params, inputs=(normed, q, k, v), target=target, graph=graph, rest=rest):
                heads = learner_of(nnx.merge(graph, params, rest))(*inputs, segment_ids=segments)
                total = head_error(heads, target, segments)
                # Layers differ by orders of magnitude; relative to its teacher's, each error counts alike.
                relative = total / jnp.maximum(head_power(target, segments), jnp.finfo(total.dtype).tiny)
                mean = total / jnp.maximum((segments != 0).sum().astype(total.dtype), 1.0)
                return relative / layers, (relative, mean)

            layer_grads, (relative, mean) = jax.grad(error, has_aux=True)(new)
            x = _after((layer_grads, mean), x)
            grads["layers"][index]["attention"]["mixer"] = layer_grads
            loss = loss + relative / layers
        errors.append(mean)
        x = block.after_heads(x, teacher_heads)
    return grads, {"loss": loss, "layer_mse": jnp.stack(errors)}


def _after(first: Any, x: Array) -> Array:
    """``x``, but not before ``first`` is computed: else a compiler runs the teacher ahead and keeps every layer alive.

    A real data dependency, because the CPU compiler drops ``optimization_barrier`` before it orders the work, and a
    maximum, because it would rewrite a sum of products and put the gradient itself off again. The maximum is +inf only
    in a run that has diverged, which stops at its loss.
    """
    largest = jnp.stack([leaf.max() for leaf in jax.tree.leaves(first)]).max()
    return jnp.where(largest == jnp.inf, largest.astype(x.dtype), x)


@reuse.scope()
def evaluate(config: RunConfig, model: Llama, batch: Batch) -> dict[str, Array]:
    """Sums over one held-out batch, to be added up and handed to ``finish``.

    ``student_nll`` and ``tokens`` always; ``teacher_nll``, ``kl``, ``layer_mse[L]``, ``layer_power[L]`` and
    ``positions`` where the teacher is still inside the model (stages 1 and 2, except full fine-tuning, which moves it).
    """
    inputs, targets, segments, mask = _arrays(batch)
    hidden = model.hidden(inputs, segment_ids=segments)
    if trains_head(config):
        return {"student_nll": cross_entropy(model, hidden, targets, mask), "tokens": mask.sum()}
    teacher = teacher_of(model)
    errors, powers = [], []
    x = teacher.embed(inputs)
    for teacher_block, student_block in zip(teacher.layers, model.layers, strict=True):
        heads = {}
        normed = teacher_block.attention_norm(x)
        for name, block in (("teacher", teacher_block), ("student", student_block)):
            q, k, v = block.attention.qkv(normed)
            heads[name] = block.attention.mixer(normed, q, k, v, segment_ids=segments)
        errors.append(head_error(heads["student"], heads["teacher"], segments))
        powers.append(head_power(heads["teacher"], segments))
        x = teacher_block.after_heads(x, heads["teacher"])
    taught = teacher.norm(x)
    nll, kl = prediction_losses(model, hidden, targets, mask, taught)
    return {
        "student_nll": nll,
        "tokens": mask.sum(),
        "kl": kl,
        "teacher_nll": cross_entropy(teacher, taught, targets, mask),
        "layer_mse": jnp.stack(errors),
        "layer_power": jnp.stack(powers),
        "positions": (segments != 0).sum().astype(jnp.float32),
    }


def finish(sums: dict[str, Array]) -> dict[str, Any]:
    """Held-out numbers from added-up sums: ``loss`` (nats a token) and ``perplexity`` of the student; with
    ``teacher_loss``, ``teacher_perplexity``, ``kl`` and the lists ``layer_mse`` and ``layer_error`` (relative to the
    teacher's mean square) where they were measured."""
    host = jax.device_get(sums)
    tokens = max(float(host["tokens"]), 1.0)

    def both(prefix: str, nll: Array) -> dict[str, float]:
        loss = float(nll) / tokens
        return {f"{prefix}loss": loss, f"{prefix}perplexity": float(jnp.exp(jnp.float32(loss)))}

    out: dict[str, Any] = both("", host["student_nll"]) | {"tokens": int(tokens)}
    if "teacher_nll" in host:
        out |= both("teacher_", host["teacher_nll"])
        out["kl"] = float(host["kl"]) / tokens
        out["layer_mse"] = [float(error) / max(float(host["positions"]), 1.0) for error in host["layer_mse"]]
        pairs = zip(host["layer_mse"], host["layer_power"], strict=True)
        out["layer_error"] = [float(error) / float(power) if power else 0.0 for error, power in pairs]
    return out


def objective(config: RunConfig, numbers: dict[str, Any]) -> float:
    """By what a stage's validations (as of ``finish``) are compared, and the best parameters handed on; less is better.

    Stage 1 goes by the KL to the teacher, which a few tokens tell better than the loss, most of which is the teacher's
    own on them. Stage 2 weighs both as its loss does, and where there is no teacher the loss decides.
    """
    if "kl" not in numbers:
        return numbers["loss"]
    share = 1.0 if config.stage == 1 else kl_share(config)
    return share * numbers["kl"] + (1.0 - share) * numbers["loss"]
