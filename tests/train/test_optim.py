import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import OptimConfig
from lizard_jax.nn.params import BaseParam, LoraParam, NewParam
from lizard_jax.train.optim import Optimizer, decays, schedule


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1), (500, 0.1)],
)
def test_schedule_warms_up_then_falls_as_a_cosine(step, share):
    rate = schedule(OptimConfig(learning_rate=2e-3, warmup=0.1, final=0.1), 100)
    np.testing.assert_allclose(rate(step), 2e-3 * share, rtol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    rate = schedule(OptimConfig(learning_rate=1.0, warmup=0.0, final=0.0), 10)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [1.0, 0.5, 0.0], atol=1e-7)


def _params(dtype=jnp.float32):
    return nnx.State(
        {
            "base": BaseParam(jnp.full((3, 2), 2.0, dtype)),
            "norm": BaseParam(jnp.full((2,), 2.0, dtype)),
            "new": NewParam(jnp.full((3, 2), 2.0)),
            "lora": LoraParam(jnp.full((3, 2), 2.0)),
        }
    )


def test_new_parameters_and_vectors_never_decay():
    mask = decays(_params())
    assert {name: mask[name] for name in mask} == {"base": True, "norm": False, "new": False, "lora": True}
    config = OptimConfig(learning_rate=0.1, warmup=0.0, weight_decay=0.5)
    params = _params()
    optimizer = Optimizer(config, 10)
    after, _, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(after["base"].get_value(), 2.0 - 0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(after["norm"].get_value(), 2.0)
    np.testing.assert_array_equal(after["new"].get_value(), 2.0)


def test_adam_step_by_hand_with_clipping():
    """After one step the bias-corrected moments are g and g², so Adam moves by rate · g / (|g| + eps)."""
    params = nnx.State({"w": NewParam(jnp.zeros(2))})
    grads = nnx.State({"w": NewParam(jnp.asarray([3.0, 4.0]))})
    optimizer = Optimizer(OptimConfig(learning_rate=0.01, warmup=0.0, clip=1.0), 10)
    after, state, info = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(info["grad_norm"], 5.0, rtol=1e-6)
    np.testing.assert_allclose(info["learning_rate"], 0.01, rtol=1e-6)
    np.testing.assert_allclose(after["w"].get_value(), -0.01, rtol=1e-5)
    moments = jax.tree.leaves(state.moments[1].mu)
    np.testing.assert_allclose(moments[0], 0.1 * np.asarray([0.6, 0.8]), rtol=1e-5)
    assert int(state.step) == 1


def test_moments_are_fp32_and_small_updates_of_bf16_weights_add_up():
    params = _params(jnp.bfloat16)
    optimizer = Optimizer(OptimConfig(learning_rate=1e-3, warmup=0.0, final=1.0), 100)
    state = optimizer.init(params)
    chex.assert_type(jax.tree.leaves(state.moments[1]._replace(count=jnp.zeros(()))), jnp.float32)
    assert set(state.master) == {"base", "norm"}
    grads = jax.tree.map(jnp.ones_like, params)
    for _ in range(20):
        params, state, _ = optimizer.update(grads, state, params)
    chex.assert_type(params["base"].get_value(), jnp.bfloat16)
    # Each update is below half a bf16 step at 2.0; together they are 20 · 1e-3.
    np.testing.assert_allclose(np.asarray(params["base"].get_value(), np.float32), 1.98, atol=0.005)
