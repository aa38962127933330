"""Measured start values: no worse than the window, and the best of what was tried."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import LizardConfig, ModelConfig, preset
from lizard_jax.data.loader import Batch
from lizard_jax.models import build
from lizard_jax.nn.feature_map import SLOW
from lizard_jax.nn.rope import inverse_frequencies
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.train import start

ATTENTION = LizardConfig(window=4, chunk=8)
CONFIG = ModelConfig(
    architecture="llama", vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, kv_heads=2,
    head_dim=8, max_positions=64, attention=dataclasses.replace(ATTENTION, softmax_layers=(1,)),
)  # fmt: skip


def make_batch(seed: int = 0) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, 50, (2, 48)).astype(np.int32)
    segments = np.ones((2, 48), np.int32)
    segments[0, 20:], segments[1, 44:] = 2, 0
    return Batch(tokens, np.roll(tokens, -1, 1), segments, (segments > 0).astype(np.float32))


def random_model(config: ModelConfig = CONFIG):
    """Weights large enough for attention to matter."""
    model = build(config, rngs=nnx.Rngs(1))
    for block in model.layers:
        for linear in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj):
            linear.kernel[...] = 20.0 * linear.kernel[...]
    return model


def layer_errors(model, batches) -> list[np.ndarray]:
    """Summed squared error of every head of every Lizard layer, on the teacher's path."""
    out = []
    hidden = [model.embed(jnp.asarray(batch.inputs)) for batch in batches]
    for index, block in enumerate(model.layers):
        total = 0.0
        for n, batch in enumerate(batches):
            segments = jnp.asarray(batch.segment_ids)
            normed = block.attention_norm(hidden[n])
            q, k, v = block.attention.qkv(normed)
            target = SoftmaxMixer(model.config, index)(normed, q, k, v, segment_ids=segments)
            heads = block.attention.mixer(normed, q, k, v, segment_ids=segments)
            error = jnp.where((segments != 0)[..., None, None], jnp.square(heads - target), 0.0)
            total = total + np.asarray(error.sum((0, 1, 3)))
            hidden[n] = block.after_heads(hidden[n], target)
        if index not in model.config.attention.softmax_layers:
            out.append(total)
    return out


def test_the_start_is_the_best_of_its_candidates_and_no_worse_than_the_window():
    batches = [make_batch(0), make_batch(1)]
    model = random_model()
    found = start.measure_start(model, batches)
    assert found.age.shape == (2, 2)
    assert found.share.shape == (2, 4)
    errors = layer_errors(model, batches)
    assert (found.error <= found.window_error * 1.01).all()
    assert found.error.mean() < found.window_error.mean()

    # What it says is what the model now does.
    window = build(dataclasses.replace(CONFIG, attention=dataclasses.replace(CONFIG.attention, memory="none")),
                   rngs=nnx.Rngs(1))  # fmt: skip
    nnx.update(window, nnx.state(model, lambda _, leaf: type(leaf).__name__ == "BaseParam"))
    ratio = [ours.sum() / theirs.sum() for ours, theirs in zip(errors, layer_errors(window, batches), strict=True)]
    np.testing.assert_allclose(ratio, found.error / found.window_error, rtol=1e-4)

    # And neither half nor twice the odds would have been better.
    mixers = [model.layers[index].attention.mixer for index in (0, 2)]
    for factor in (0.5, 2.0):
        for mixer in mixers:
            mixer.beta[...] = mixer.beta[...] + jnp.log(factor)
        other = layer_errors(model, batches)
        for mixer in mixers:
            mixer.beta[...] = mixer.beta[...] - jnp.log(factor)
        assert sum(e.sum() for e in other) >= sum(e.sum() for e in errors) * (1 - 1e-3)


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({}, True),
        ({"gate": "mamba2", "gate_bias": False}, True),
        ({"gate": "mamba2", "gate_bias": False, "kept": 3, "chunk": 4}, True),
        ({"memory": "none"}, False),
        ({"measured_start": False}, False),
    ],
)
def test_what_there_is_to_measure(changes, measured):
    attention = dataclasses.replace(ATTENTION, **changes)
    assert start.measures(attention) == measured
    if measured and changes:
        model = random_model(dataclasses.replace(CONFIG, attention=attention))
        before = [jnp.array(block.attention.mixer.gate.bias[...]) for block in model.layers]
        found = start.measure_start(model, [make_batch()])
        assert np.isnan(found.age).all()
        assert "age" not in found.summary()
        for block, bias in zip(model.layers, before, strict=True):
            np.testing.assert_array_equal(block.attention.mixer.gate.bias[...], bias)


def test_published_presets_start_as_published():
    for name in ("lizard_paper", "lizard_sink", "lolcats"):
        assert not start.measures(preset(name))
    assert not start.measures(None)


def test_slow_maps_see_slow_pairs_alone_and_are_shared_by_a_group():
    model = random_model()
    mixer = model.layers[0].attention.mixer
    q_map, k_map = np.asarray(mixer.phi_q.kernel[...]), np.asarray(mixer.phi_k.kernel[...])
    np.testing.assert_array_equal(q_map, np.repeat(k_map, 2, axis=0))
    slow = np.asarray(inverse_frequencies(CONFIG.rope, 8)) * ATTENTION.window <= SLOW
    assert 0 < slow.sum() < slow.size
    used = (k_map != 0).any(axis=(0, 2))
    np.testing.assert_array_equal(used, np.concatenate([slow, slow]))
    assert jax.tree.leaves(nnx.state(mixer.phi_q))[0].dtype == jnp.float32


def test_layers_of_fewer_heads_start_alike_and_are_told_with_gaps():
    attention = dataclasses.replace(ATTENTION, softmax_heads=("0.1",), kept=2, chunk=4, budgets=("2.0=8+5",))
    model = random_model(dataclasses.replace(CONFIG, attention=attention))
    found = start.measure_start(model, [make_batch(0), make_batch(1)])
    assert found.share.shape == (3, 4)
    assert np.isnan(found.share).sum(axis=1).tolist() == [2, 0, 0]
    assert np.isnan(found.age).sum(axis=1).tolist() == [1, 0, 0]
    assert "memory's share" in found.summary()
    assert "nan" not in found.summary()
    assert (found.error <= found.window_error * 1.01).all()
