"""Softmax over whole texts by kernels, interpreted, is the dense definition; the mixer takes them on TPUs and GPUs."""

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
GPU = Target("gpu", "sm_90", interpret=True)
LENGTH = {"tpu": 384, "gpu": 90}
"""Three blocks, and four parts of which the last is shorter."""


def needs(*modules):
    missing = any(importlib.util.find_spec(name) is None for name in modules)
    return pytest.mark.skipif(missing, reason=f"needs {', '.join(modules)}")


def inputs(dtype, target):
    rng, length, width = np.random.default_rng(0), LENGTH[target.platform], 64 if target.platform == "tpu" else 16
    q, k, v, dy = (rng.standard_normal((2, length, heads, width)).astype(dtype) for heads in (4, 2, 2, 4))
    documents = np.zeros((2, length), np.int32)
    documents[0, length // 4 :], documents[0, length // 3 * 2 :], documents[1, length - 30 :] = 1, 2, -1
    return q / np.asarray(4, dtype), k, v, dy, documents


@pytest.mark.parametrize(
    ("on", "dtype", "packed", "window"),
    [
        (TPU, "float32", True, None),
        (TPU, "float32", False, 100),
        (TPU, "bfloat16", True, 130),
        (GPU, "bfloat16", False, None),
        (GPU, "bfloat16", True, 37),
    ],
)
def test_outputs_and_gradients_are_those_of_the_definition(on, dtype, packed, window):
    *arrays, documents = inputs(jnp.dtype(dtype), on)
    length, width = arrays[0].shape[1::2]
    with target.override(on):
        # What a caller multiplies queries by is part of these; the definition does the rest.
        rest = width**-0.5 / flash.scale(width)

    def dense(q, k, v):
        k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
        index = jnp.arange(length)
        seen = (index <= index[:, None]) & (index > index[:, None] - (window or length))
        if packed:
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        scores = jnp.where(seen, jnp.einsum("btnh,bsnh->bnts", rest * q, k), -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    def kernel(q, k, v):
        return flash.causal_attention(q, k, v, jnp.asarray(documents) if packed else None, window=window)

    def both(function, q, k, v, dy):
        y, back = jax.vjp(function, q, k, v)
        return y, *back(dy)

    with jax.enable_x64(True):
        want = jax.jit(lambda *a: both(dense, *a))(*(a.astype("float64") for a in arrays))
    with target.override(on):
        assert flash.fits(*arrays[:2])
        got = jax.jit(lambda *a: both(kernel, *a))(*arrays)
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == dtype
        b = np.asarray(b)
        error = np.asarray(a, "float64") - b
        assert np.sqrt(np.mean(error**2) / np.mean(np.square(b))) < TOLERANCE[dtype], name


@pytest.mark.parametrize(("on", "dtype"), [(TPU, "float32"), (GPU, "bfloat16")])
def test_a_softmax_layer_is_the_same_by_a_kernel(on, dtype):
    """With two documents of one id, which stay two, and padding, which gives zeros and takes no gradient."""
    q, k, v, dy, _ = map(jnp.asarray, inputs(jnp.dtype(dtype), on))
    length, width = q.shape[1::2]
    config = ModelConfig(
        architecture="llama", vocab_size=8, hidden_size=16, intermediate_size=8, num_layers=1, num_heads=4, kv_heads=2,
        head_dim=width, max_positions=length, sliding_window=length // 4,
    )  # fmt: skip
    mixer, x = SoftmaxMixer(config, 0), jnp.zeros((2, length, 16), dtype)
    segments = np.ones((2, length), np.int32)
    segments[0, length // 4 : length // 2], segments[1, length - 30 :] = 2, 0

    def both(q, k, v):
        y, back = jax.vjp(lambda q, k, v: mixer(x, q, k, v, segment_ids=jnp.asarray(segments)), q, k, v)
        return y, *back(dy)

    want = jax.jit(lambda *a: both(*a))(q, k, v)
    with target.override(on):
        traced = jax.jit(lambda *a: both(*a)).trace(q, k, v)
        got = traced.lower().compile()(q, k, v)
    names = ("splash",) if on is TPU else ("pure_callback", "pallas_call")
    assert any(name in str(traced.jaxpr) for name in names)
    for a, b in zip(got, want, strict=True):
        a, b = (np.asarray(x, "float64") for x in (a, b))
        assert not a[1, length - 30 :].any()
        assert np.sqrt(np.mean((a - b) ** 2) / np.mean(np.square(b))) < TOLERANCE[dtype]
        if dtype == "float32":
            np.testing.assert_allclose(a, b, atol=3e-5)


def test_what_it_does_not_fit_goes_another_way():
    def fits(on, length, dtype=jnp.float32, width=16):
        with target.override(on):
            q, k = (jnp.zeros((1, length, heads, width), dtype) for heads in (4, 2))
            return flash.fits(q, k)

    assert not fits(Target("cpu"), 256)
    assert fits(TPU, 256)
    assert not fits(TPU, 200)
    assert not fits(TPU, 256, jnp.float16)
    assert fits(GPU, 200, jnp.bfloat16)
    assert not fits(GPU, 200)
    assert not fits(GPU, 200, jnp.bfloat16, width=8)
    assert not fits(Target("gpu", "sm_75"), 200, jnp.bfloat16)


@pytest.mark.parametrize(
    "chip",
    [
        pytest.param("v5e", marks=needs("libtpu")),
        pytest.param("sm_90", marks=needs("jax_cuda13_plugin", "jax_triton")),
    ],
)
def test_it_compiles_for_a_chip_and_keeps_no_scores(chip):
    def loss(q, k, v, documents):
        return flash.causal_attention(q, k, v, documents).astype(jnp.float32).sum()

    q, k = (jax.ShapeDtypeStruct((1, 1024, heads, 128), jnp.bfloat16) for heads in (8, 2))
    documents = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    compiled = compile_for(chip, jax.grad(loss, argnums=(0, 1, 2)), q, k, k, documents)
    assert len({kernel.name for kernel in compiled.kernels}) == 3
    assert chip != "v5e" or len(compiled.kernels) == 3
    assert compiled.executable.memory_analysis().temp_size_in_bytes < 8 * 1024 * 1024
