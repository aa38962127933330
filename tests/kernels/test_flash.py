"""Softmax attention through JAX's flash kernel, interpreted, is the dense definition; the mixer takes it on TPUs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.chips.compilers import compile_for
from lizard_jax.config import ModelConfig
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from pallas_kernels import flash, target
from pallas_kernels.target import Target
from tests.kernels.parity import TOLERANCE

TPU = Target("tpu", "v5e", interpret=True)
T = 384
"""Three blocks."""


def inputs(dtype):
    rng = np.random.default_rng(0)
    q, k, v, dy = (rng.standard_normal((2, T, heads, 64)).astype(dtype) for heads in (4, 2, 2, 4))
    documents = np.zeros((2, T), np.int32)
    documents[0, 100:], documents[0, 250:], documents[1, 350:] = 1, 2, -1
    return q / np.asarray(4, dtype), k, v, dy, documents


@pytest.mark.parametrize(
    ("dtype", "packed", "window"), [("float32", True, None), ("float32", False, 100), ("bfloat16", True, 130)]
)
def test_outputs_and_gradients_are_those_of_the_definition(dtype, packed, window):
    *arrays, documents = inputs(jnp.dtype(dtype))

    def dense(q, k, v):
        k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
        index = jnp.arange(T)
        seen = (index <= index[:, None]) & (index > index[:, None] - (window or T))
        if packed:
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        scores = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", q, k), -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    def kernel(q, k, v):
        return flash.causal_attention(q, k, v, jnp.asarray(documents) if packed else None, window=window)

    def both(function, q, k, v, dy):
        y, back = jax.vjp(function, q, k, v)
        return y, *back(dy)

    with jax.enable_x64(True):
        want = jax.jit(lambda *a: both(dense, *a))(*(a.astype("float64") for a in arrays))
    with target.override(TPU):
        got = jax.jit(lambda *a: both(kernel, *a))(*arrays)
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == dtype
        b = np.asarray(b)
        error = np.asarray(a, "float64") - b
        assert np.sqrt(np.mean(error**2) / np.mean(np.square(b))) < TOLERANCE[dtype], name


def test_a_softmax_layer_is_the_same_on_a_tpu():
    """With two documents of one id, which stay two, and padding, which gives zeros and takes no gradient."""
    config = ModelConfig(
        architecture="llama", vocab_size=8, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=4, kv_heads=2,
        head_dim=64, max_positions=T, sliding_window=100,
    )  # fmt: skip
    mixer, x = SoftmaxMixer(config, 0), jnp.zeros((2, T, 16))
    q, k, v, dy, _ = map(jnp.asarray, inputs(jnp.dtype("float32")))
    segments = np.ones((2, T), np.int32)
    segments[0, 100:250], segments[1, 350:] = 2, 0

    def both(q, k, v):
        y, back = jax.vjp(lambda q, k, v: mixer(x, q, k, v, segment_ids=jnp.asarray(segments)), q, k, v)
        return y, *back(dy)

    want = jax.jit(lambda *a: both(*a))(q, k, v)
    with target.override(TPU):
        traced = jax.jit(lambda *a: both(*a)).trace(q, k, v)
        got = traced.lower().compile()(q, k, v)
    assert "splash" in str(traced.jaxpr)
    for a, b in zip(got, want, strict=True):
        assert not np.asarray(a)[1, 350:].any()
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_what_it_does_not_fit_goes_another_way():
    assert not flash.fits(jnp.zeros((1, 256, 1, 8)))
    with target.override(TPU):
        assert flash.fits(jnp.zeros((1, 256, 1, 8)))
        assert not flash.fits(jnp.zeros((1, 200, 1, 8)))
        assert not flash.fits(jnp.zeros((1, 256, 1, 8), jnp.float16))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_it_compiles_for_a_tpu_and_keeps_no_scores():
    def loss(q, k, v, documents):
        return flash.causal_attention(q, k, v, documents).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((1, 1024, heads, 128), jnp.bfloat16) for heads in (8, 2))
    documents = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    compiled = compile_for("v5e", jax.grad(loss, argnums=(0, 1, 2)), q, k, k, documents)
    assert len(compiled.kernels) == 3
    assert compiled.executable.memory_analysis().temp_size_in_bytes < 8 * 1024 * 1024
