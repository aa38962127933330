"""The stages' losses: what is compared with what, and what gets a gradient."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax import losses
from lizard_jax.config import LizardConfig, LoraConfig, ModelConfig, RunConfig
from lizard_jax.data.loader import Batch
from lizard_jax.lora import add_lora
from lizard_jax.models import build
from lizard_jax.nn.params import BaseParam, LoraParam, NewParam
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.plan.flops import matmul_flops
from lizard_jax.train import stages

CONFIG = ModelConfig(
    architecture="llama", vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, kv_heads=2,
    head_dim=4, max_positions=32, attention=LizardConfig(window=4, chunk=8, softmax_layers=(1,)),
)  # fmt: skip


def make_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, 24)).astype(np.int32)
    segments = np.ones((2, 24), np.int32)
    segments[0, 10:] = 2
    segments[1, 20:] = 0
    mask = (segments > 0).astype(np.float32)
    return Batch(inputs=tokens, targets=np.roll(tokens, -1, 1), segment_ids=segments, loss_mask=mask)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, rngs=nnx.Rngs(3))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "changes",
    [{}, {"chunk": 4, "kept": 3, "softmax_heads": ("0.1",), "budgets": ("2.0=6+2",)}],
    ids=["", "kept pairs, exact heads and budgets"],
)
def test_stage1_gradients_are_those_of_each_layer_on_the_teachers_path(changes):
    """Against autodiff of all layers' errors at once, with the teacher's path held constant.

    In float64: the errors of a random model are small differences, and their gradients cancel.
    """
    batch = make_batch()
    assert CONFIG.attention is not None
    config = dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, **changes))
    model = build(config, rngs=nnx.Rngs(3))
    nnx.update(model, jax.tree.map(lambda a: a.astype("float64"), nnx.state(model)))
    grads, metrics = jax.jit(lambda m, b: stages.loss_and_grads(RunConfig(stage=1), m, b))(model, batch)
    graph, new, rest = nnx.split(model, NewParam, ...)

    def errors(new):
        student = nnx.merge(graph, new, rest)
        x, out, relative = student.embed(jnp.asarray(batch.inputs)), [], []
        for i, block in enumerate(student.layers):
            normed = block.attention_norm(x)
            q, k, v = block.attention.qkv(normed)
            target = SoftmaxMixer(CONFIG, i)(normed, q, k, v, segment_ids=jnp.asarray(batch.segment_ids))
            heads = block.attention.mixer(normed, q, k, v, segment_ids=jnp.asarray(batch.segment_ids))
            error = jnp.where(batch.segment_ids != 0, jnp.square(heads - target).mean((-2, -1)), 0.0)
            out.append(error.sum() / float((batch.segment_ids != 0).sum()))
            # Heads that keep softmax have no error, and their power counts to nobody.
            learn = slice(0, 2) if "softmax_heads" in changes and i == 0 else slice(None)
            scale = target[:, :, learn].size / target.size
            power = jnp.where(batch.segment_ids != 0, jnp.square(target[:, :, learn]).mean((-2, -1)), 0.0)
            relative.append(error.sum() / scale / jax.lax.stop_gradient(power.sum()))
            out[-1] = out[-1] / scale
            x = jax.lax.stop_gradient(block.after_heads(x, target))
        return (relative[0] + relative[2]) / 2.0, jnp.stack(out)

    (loss, layer_mse), want = jax.jit(jax.value_and_grad(errors, has_aux=True))(new)
    chex.assert_trees_all_close(metrics["loss"], loss, rtol=1e-9)
    chex.assert_trees_all_close(metrics["layer_mse"], layer_mse, rtol=1e-9, atol=1e-20)
    assert float(metrics["layer_mse"][1]) == 0.0
    for got_leaf, want_leaf in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert got_leaf.dtype == want_leaf.dtype == np.float64
        chex.assert_trees_all_close(got_leaf, want_leaf, rtol=1e-9, atol=1e-12 * float(jnp.abs(want_leaf).max()))


def test_the_teacher_inside_is_the_softmax_decoder(model):
    adapted = nnx.clone(model)
    add_lora(adapted, LoraConfig(), nnx.Rngs(0))
    for leaf in jax.tree.leaves(nnx.state(adapted, LoraParam), is_leaf=lambda x: isinstance(x, LoraParam)):
        assert leaf.dtype == jnp.float32
    nnx.update(adapted, jax.tree.map(lambda x: x + 1, nnx.state(adapted, LoraParam)))
    inside = stages.teacher_of(adapted)
    assert not jax.tree.leaves(nnx.state(inside, nnx.Any(NewParam, LoraParam)))
    chex.assert_trees_all_equal(nnx.state(inside, BaseParam), nnx.state(model, BaseParam))
    assert all(isinstance(block.attention.mixer, SoftmaxMixer) for block in inside.layers)


def test_cross_entropy_in_slices_is_the_whole(model, monkeypatch):
    batch = make_batch()
    hidden = jax.jit(lambda m, ids: m.hidden(ids))(model, batch.inputs)

    def total(hidden):
        return losses.cross_entropy(model, hidden, jnp.asarray(batch.targets), jnp.asarray(batch.loss_mask))

    whole, grad = jax.jit(jax.value_and_grad(total))(hidden)
    logits = np.asarray(model.logits(hidden), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -(np.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0] * batch.loss_mask).sum()
    np.testing.assert_allclose(whole, want, rtol=1e-5)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2 * 5 * 50)
    sliced, sliced_grad = jax.jit(jax.value_and_grad(lambda h: total(h)))(hidden)
    chex.assert_trees_all_close((sliced, sliced_grad), (whole, grad), rtol=1e-5, atol=1e-6)


def test_kl_is_that_of_the_whole_vocabulary_in_slices_too(model, monkeypatch):
    batch = make_batch()
    inputs, mask = jnp.asarray(batch.inputs), jnp.asarray(batch.loss_mask)
    student, teacher = jax.jit(lambda m, ids: (m.hidden(ids), stages.teacher_of(m).hidden(ids)))(model, inputs)

    def total(hidden, taught):
        return losses.prediction_losses(model, hidden, jnp.asarray(batch.targets), mask, taught)

    nll, kl = jax.jit(total)(student, teacher)
    p, t = (jax.nn.softmax(np.asarray(model.logits(x), np.float32)) for x in (student, teacher))
    np.testing.assert_allclose(kl, ((t * (np.log(t) - np.log(p))).sum(-1) * batch.loss_mask).sum(), rtol=1e-3)
    np.testing.assert_allclose(nll, losses.cross_entropy(model, student, jnp.asarray(batch.targets), mask), rtol=1e-6)
    assert float(jax.jit(total)(teacher, teacher)[1]) == pytest.approx(0.0, abs=1e-5)
    assert float(total(student, None)[1]) == 0.0

    # No gradient reaches the teacher, and slices change nothing.
    by_both = jax.jit(jax.grad(lambda h, t: total(h, t)[1], argnums=(0, 1)))
    ours, theirs = by_both(student, teacher)
    assert not np.asarray(theirs).any()
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2 * 2 * 5 * 50)
    sliced = jax.jit(jax.value_and_grad(lambda h: total(h, teacher)[1]))(student)
    chex.assert_trees_all_close(sliced, (kl, ours), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("share", "at_once"), [(0.0, 2**26), (0.25, 2**26), (1.0, 500), (0.25, 1500)])
def test_through_a_frozen_head_loss_and_gradient_are_the_same_and_logits_are_formed_once(
    model, monkeypatch, share, at_once
):
    batch = make_batch()
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    subject = nnx.clone(model)
    nnx.update(subject, jax.tree.map(lambda a: a.astype("float64"), nnx.state(subject)))
    targets, mask = jnp.asarray(batch.targets), jnp.asarray(batch.loss_mask, "float64")
    rng = np.random.default_rng(0)
    hidden, taught = (jnp.asarray(rng.standard_normal((*targets.shape, CONFIG.hidden_size))) for _ in range(2))
    taught = taught if share else None

    def again(hidden):
        nll, kl = (total / mask.sum() for total in losses.prediction_losses(subject, hidden, targets, mask, taught))
        return (1 - share) * nll + share * kl, (nll, kl)

    def once(hidden):
        return losses.frozen_head_loss(subject, hidden, targets, mask, taught, kl_share=share)

    want, got = (jax.jit(jax.value_and_grad(f, has_aux=True))(hidden) for f in (again, once))
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-15)
    products = [matmul_flops(jax.grad(lambda h, f=f: f(h)[0]), hidden) for f in (again, once)]
    assert products[0] * (3 if share else 2) == products[1] * (5 if share else 3)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kl", "full"), [(0.0, False), (0.25, False), (1.0, False), (0.25, True)])
def test_stage2_mixes_its_losses_as_asked(model, kl, full):
    """In float64: the KL of a random model is a thousandth of a hundredth of what it is the difference of."""
    config = RunConfig(stage=2, kl=kl, full=full)
    subject = nnx.clone(model)
    if not full:
        add_lora(subject, LoraConfig(), nnx.Rngs(0))
    nnx.update(subject, jax.tree.map(lambda a: a.astype("float64"), nnx.state(subject)))
    batch = make_batch()
    grads, metrics = jax.jit(lambda m, b: stages.loss_and_grads(config, m, b))(subject, batch)
    sums = jax.jit(lambda m, b: stages.evaluate(config, m, b))(subject, batch)
    tokens = float(sums["tokens"])
    share = 0.0 if full else kl
    want = (1 - share) * float(sums["student_nll"]) / tokens + share * float(sums.get("kl", 0.0)) / tokens
    assert float(metrics["loss"]) == pytest.approx(want, rel=1e-5)
    assert ("kl" in metrics) == (share > 0)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({"stage": 0}, {BaseParam}),
        ({"stage": 1}, {NewParam}),
        ({"stage": 2}, {LoraParam, NewParam}),
        ({"stage": 2, "train_new": False}, {LoraParam}),
        ({"stage": 2, "full": True}, {BaseParam, NewParam}),
    ],
)
def test_a_stage_trains_what_it_says(model, settings, kinds):
    config = RunConfig(**settings)
    subject = build(CONFIG, rngs=nnx.Rngs(3)) if config.stage else build(
        ModelConfig(**{**vars(CONFIG), "attention": None}), rngs=nnx.Rngs(3)
    )  # fmt: skip
    if config.stage == 2 and not config.full:
        add_lora(subject, LoraConfig(), nnx.Rngs(0))
    chosen = nnx.state(subject, stages.trainable(config))
    found = {type(leaf) for leaf in jax.tree.leaves(chosen, is_leaf=lambda x: isinstance(x, nnx.Variable))}
    assert found == kinds


def test_finish_divides_sums_by_what_was_counted():
    sums = {
        "student_nll": jnp.float32(20.0), "teacher_nll": jnp.float32(10.0), "tokens": jnp.float32(10.0),
        "layer_mse": jnp.asarray([4.0, 8.0]), "layer_power": jnp.asarray([8.0, 0.0]), "positions": jnp.float32(16.0),
        "kl": jnp.float32(1.5),
    }  # fmt: skip
    out = stages.finish(sums)
    assert out["loss"] == pytest.approx(2.0)
    assert out["perplexity"] == pytest.approx(np.exp(2.0), rel=1e-6)
    assert out["teacher_loss"] == pytest.approx(1.0)
    assert out["layer_mse"] == pytest.approx([0.25, 0.5])
    assert out["layer_error"] == pytest.approx([0.5, 0.0])
    assert out["kl"] == pytest.approx(0.15)


def test_a_stage_hands_on_what_is_closest_to_what_it_learns():
    early, late = {"loss": 2.90, "kl": 0.05}, {"loss": 2.91, "kl": 0.03}
    first, second, alone = RunConfig(stage=1), RunConfig(stage=2, kl=0.9), RunConfig(stage=2, kl=0.0)
    assert stages.objective(first, late) < stages.objective(first, early)
    assert stages.objective(second, late) == pytest.approx(0.9 * 0.03 + 0.1 * 2.91)
    assert stages.objective(alone, early) == 2.90
    assert stages.objective(RunConfig(stage=0), {"loss": 3.0}) == 3.0
