"""Causal softmax on a CPU goes block by block and on accelerators in two parts; both are the dense definition."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lizard_jax.nn import causal_blocks
from lizard_jax.nn.softmax_attention import causal_attention
from pallas_kernels import target
from pallas_kernels.target import Target
from tests.kernels.parity import TOLERANCE


def inputs(length: int, dtype: str = "float64"):
    """``(q, k, v, dy, first)`` of two rows: all of the past in one; documents, padding and a window in the other."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.standard_normal((2, length, heads, 8)).astype(jnp.dtype(dtype)) for heads in (6, 2, 2, 6))
    index = np.arange(length)
    documents = np.maximum(np.where(index < length // 3, 0, length // 3), index - 20)
    documents[length // 2 : length // 2 + 3] = index[length // 2 : length // 2 + 3] + 1
    return q, k, v, dy, np.stack([np.zeros(length, int), documents]).astype(np.int32)


def both(function, q, k, v, dy, first):
    y, back = jax.vjp(lambda q, k, v: function(q, k, v, first), q, k, v)
    return y, *back(dy)


def dense(q, k, v, first):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    index = jnp.arange(q.shape[1], dtype=jnp.int32)
    seen = ((first[..., None] <= index) & (index <= index[:, None]))[:, None]
    scores = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jnp.where(seen.any(-1, keepdims=True), jax.nn.softmax(scores), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


@pytest.mark.parametrize(("platform", "length"), [("cpu", 75), ("cpu", 64), ("cpu", 9), ("gpu", 200)])
def test_outputs_and_gradients_are_those_of_the_definition(monkeypatch, platform, length):
    monkeypatch.setattr(causal_blocks, "BLOCK", 16)
    monkeypatch.setattr("lizard_jax.nn.softmax_attention.BLOCK", 16)
    with jax.enable_x64(True):
        arrays = inputs(length)
        want = jax.jit(functools.partial(both, dense))(*arrays)
        with target.override(Target(platform, {"gpu": "sm_90"}.get(platform))):
            got = jax.jit(functools.partial(both, lambda *a: causal_attention(*a)))(*arrays)
    chex.assert_trees_all_close(got, want, atol=1e-12, rtol=1e-10)
    assert not np.asarray(got[0])[1, length // 2].any()


def test_narrow_inputs_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(causal_blocks, "BLOCK", 16)
    arrays = inputs(75, "bfloat16")
    with jax.enable_x64(True):
        want = jax.jit(functools.partial(both, dense))(*(x.astype("float64") for x in arrays[:4]), arrays[4])
    got = jax.jit(functools.partial(both, lambda *a: causal_blocks.blockwise_attention(*a)))(*arrays)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.asarray(a, "float64") - np.asarray(b)
        assert np.sqrt(np.mean(error**2) / np.mean(np.square(b))) < TOLERANCE["bfloat16"]


def test_memory_is_that_of_a_block():
    """Forward and backward pass: nothing of the scores of all pairs, which would be 128 MiB."""
    length = 2048
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (8, 2, 2, 8)]
    function = jax.jit(functools.partial(both, lambda *a: causal_attention(*a)))
    compiled = function.lower(*shapes, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**20
