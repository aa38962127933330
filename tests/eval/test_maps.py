"""The dense maps against the mixers they describe: weights times values are their outputs, and the shares add up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import PRESETS, LizardConfig, ModelConfig, RopeConfig
from lizard_jax.eval.maps import layer_maps
from lizard_jax.nn.attention import Attention

CONFIG = ModelConfig("llama", 31, 16, 24, 1, 4, 2, 8, 64)
TIME = 29
SMALL = {"window": 6, "chunk": 4, "meta_tokens": 3}
ATTENTION = {
    **{name: dataclasses.replace(switches, **SMALL) for name, switches in PRESETS.items()},
    "learned": LizardConfig(meta="learned", gate="channel", gate_bias=False, **SMALL),
    "sink": LizardConfig(meta="sink", **SMALL),
    "prefix": LizardConfig(meta="prefix", gate="low_rank", gate_bias=False, linear_rope=True, **SMALL),
    "window": LizardConfig(memory="none", **SMALL),
    "some heads": LizardConfig(softmax_heads=("0.0",), **SMALL),
    "some heads in a long window": LizardConfig(softmax_heads=("0.1",), retrieval_window=9, **SMALL),
    "kept pairs": LizardConfig(kept=3, **SMALL),
    "budgets": LizardConfig(budgets=("0.1=8+3",), **SMALL),
    "kept pairs and a sink": LizardConfig(kept=3, meta="sink", **SMALL),
    "softmax": None,
    "sliding": None,
}


def layer(name):
    config = dataclasses.replace(CONFIG, attention=ATTENTION[name], sliding_window=7 if name == "sliding" else None)
    if name == "softmax":
        config = dataclasses.replace(config, rope=RopeConfig(kind="dynamic", factor=2.0, original_max_positions=16))
    rng = np.random.default_rng(2)

    @jax.jit
    def made():
        attention = Attention(config, 0, dtype=jnp.float32, rngs=nnx.Rngs(0))
        return jax.tree.map(
            lambda x: x * (20 if x.ndim == 2 else 1) + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), attention
        )

    return made()


@pytest.mark.parametrize("name", ATTENTION)
def test_weights_times_values_are_the_heads(name):
    attention = layer(name)
    normed = np.random.default_rng(1).normal(size=(1, TIME, 16)).astype(np.float32)
    q, k, v = (np.asarray(x) for x in jax.jit(lambda attention: attention.qkv(normed))(attention))
    mixer = attention.mixer
    run = jax.jit(lambda mixer, v: mixer(normed, q, k, v))
    # What memory of its own adds is what comes out of values that are all zero.
    heads = (np.asarray(run(mixer, v), np.float64) - np.asarray(run(mixer, np.zeros_like(v)), np.float64))[0]
    maps = layer_maps(attention, jnp.asarray(normed))
    values = np.repeat(np.asarray(v, np.float64)[0], 2, axis=1)
    np.testing.assert_allclose(np.einsum("nij,jnh->inh", maps.total, values), heads, atol=2e-5)
    assert maps.window.min() >= 0
    assert maps.gated.min() >= 0

    alpha = getattr(mixer, "alpha", None)
    expected = 1.0 if alpha is None else 1.0 + float(alpha[...])
    # Kept pairs are read off the mixer itself, in fp32.
    error = 2e-6 if "kept" in name else 1e-12
    np.testing.assert_allclose(maps.total.sum(axis=-1) + maps.meta, expected, atol=error)
    if name in ("sink", "learned"):
        assert maps.meta.min() > 0
        assert maps.gated[:, :6].max() == 0
        assert maps.gated[:, 6:].sum(-1).min() > 0
    if name in ("softmax", "sliding"):
        assert maps.gated.max() == maps.meta.max() == 0
