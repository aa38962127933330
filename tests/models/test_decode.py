"""Chunks and single steps against the full forward, packed documents against each alone, and blocks of queries."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import PRESETS, LizardConfig, ModelConfig, RopeConfig
from lizard_jax.errors import UserError
from lizard_jax.models import build
from lizard_jax.nn import softmax_attention
from lizard_jax.nn.rope import segment_lengths, segment_positions
from lizard_jax.nn.softmax_attention import interval_attention
from tests.jitted import logits

CONFIG = ModelConfig("llama", 31, 16, 24, 2, 4, 2, 8, 64)


def model_of(**changes):
    config = ModelConfig(**{**CONFIG.__dict__, **changes})

    @jax.jit
    def made():
        # Start values of 0.02 would hide mistakes below the tolerance.
        return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, build(config, rngs=nnx.Rngs(0)))

    return made()


def ids(length, batch=2):
    """Tokens in numpy, whose slices need no compiling."""
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (batch, length), np.int32)


@jax.jit
def extend(model, tokens, state, lengths=None):
    return model.extend(tokens, state, lengths)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "qwen3", "qk_norm": True, "sliding_window": 5, "sliding_window_layers": (1,)},
        {"rope": RopeConfig(kind="dynamic", factor=2.0, original_max_positions=64)},
        {"attention": LizardConfig(window=8, chunk=4, softmax_layers=(0,))},
        {"attention": LizardConfig(window=8, chunk=4, softmax_heads=("0.1",), kept=3), "num_layers": 1},
        {"attention": LizardConfig(window=8, chunk=4, softmax_heads=("0.1",), retrieval_window=16), "num_layers": 1},
        {"attention": LizardConfig(window=8, chunk=4, budgets=("0.0=6+0", "0.1=8+3")), "num_layers": 1},
    ],
    ids=[
        "llama",
        "window_in_one_layer",
        "dynamic_rope",
        "one_softmax_layer",
        "some_heads_and_pairs",
        "long_window",
        "budgets",
    ],
)
def test_chunks_and_steps_equal_the_full_forward(changes):
    model = model_of(**changes)
    tokens = ids(23)
    state, parts, at = model.init_state(2, 23), [], 0
    for count in (9, 1, 1, 9, 1, 1, 1):
        out, state = extend(model, tokens[:, at : at + count], state)
        parts.append(np.asarray(out))
        at += count
    chex.assert_trees_all_close(np.concatenate(parts, axis=1), np.asarray(logits(model, tokens)), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.7],
            "long_factor": [1.0, 2.5, 4.0, 6.0], "original_max_position_embeddings": 16,
        },
    ],
    ids=["dynamic", "longrope"],
)  # fmt: skip
def test_a_rope_of_the_length_decodes_past_its_context_as_transformers_does(tmp_path, rope):
    from transformers import DynamicCache

    from lizard_jax.convert.load import load_hf
    from tests.models import hf

    reference = hf.make("Llama", tmp_path, rope_parameters=rope, max_position_embeddings=16)
    tokens = hf.tokens(24)
    cache, expected = DynamicCache(), []
    model = load_hf(tmp_path)
    state, ours = model.init_state(2, 24), []
    for start, stop in ((0, 12), (12, 13), (13, 20), (20, 21)):
        expected.append(hf.extend_logits(reference, tokens[:, start:stop], cache))
        got, state = extend(model, tokens[:, start:stop], state)
        ours.append(got)
    chex.assert_trees_all_close(ours, expected, atol=1e-4, rtol=0)


def test_running_past_the_cache_is_loud():
    model = model_of()
    tokens = ids(9)
    with pytest.raises(UserError, match="holds 8 tokens, 0 are filled and 9 more"):
        model.extend(tokens, model.init_state(2, 8))
    _, state = extend(model, tokens[:, :6], model.init_state(2, 8))
    with pytest.raises(UserError, match="holds 8 tokens, 6 are filled and 3 more"):
        model.extend(tokens[:, 6:], state)
    # Under jit the position is unknown: the numbers themselves say so.
    out, state = jax.jit(lambda state: model.extend(tokens[:, 6:8], state))(state)
    assert bool(jnp.all(jnp.isfinite(out)))
    out, _ = jax.jit(lambda state: model.extend(tokens[:, 8:], state))(state)
    assert bool(jnp.all(jnp.isnan(out)))
    with pytest.raises(UserError, match="max_length"):
        model.init_state(2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 3}, {"rope": RopeConfig(kind="dynamic", factor=2.0, original_max_positions=4)}],
    ids=["plain", "window", "dynamic_rope"],
)
def test_a_packed_document_reads_as_it_does_alone(changes):
    """Also where two documents carry the same id with another between, and where padding lies between them."""
    model = model_of(**changes)
    lengths, names = [5, 9, 3, 4, 6], [1, 2, 1, 0, 1]
    tokens = ids(sum(lengths), 1)
    segments = np.repeat(names, lengths)[None].astype(np.int32)
    packed = np.asarray(logits(model, tokens, segments))
    at = 0
    for length, name in zip(lengths, names, strict=True):
        if name:
            alone = np.asarray(logits(model, tokens[:, at : at + length]))
            chex.assert_trees_all_close(packed[:, at : at + length], alone, atol=2e-5, rtol=0)
        at += length


def test_padding_gets_zero_heads_and_gives_no_gradient():
    model = model_of()
    attention = model.layers[0].attention
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    segments = jnp.asarray([[0, 1, 1, 0, 0, 2]], jnp.int32)

    def squares(x):
        heads = attention.mixer(x, *attention.qkv(x), segment_ids=segments)
        return jnp.sum(jnp.square(heads)), heads

    gradient, heads = map(np.asarray, jax.jit(jax.grad(squares, has_aux=True))(x))
    padding = np.asarray(segments[0] == 0)
    assert not heads[0][padding].any()
    chex.assert_tree_all_finite(gradient)
    assert not gradient[0][padding].any()
    assert gradient[0][~padding].any()


def test_query_blocks_change_nothing_but_memory(monkeypatch):
    """The same outputs and gradients block by block, and temporary memory far below N·T·T scores."""
    keys = jax.random.split(jax.random.key(0), 3)
    length = 75
    q = jax.random.normal(keys[0], (2, length, 4, 8))
    k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[1:])
    index = jnp.arange(length, dtype=jnp.int32)[None]
    first = jnp.maximum(index - 20, 0)

    def loss(q, k, v):
        out = interval_attention(q, k, v, first, index)
        return jnp.sum(jnp.sin(out)), out

    whole = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    monkeypatch.setattr(softmax_attention, "QUERY_BLOCK", 16)
    blocks = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    chex.assert_trees_all_close(blocks, whole, atol=1e-5, rtol=1e-5)

    monkeypatch.setattr(softmax_attention, "QUERY_BLOCK", 64)
    length = 2048
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (4, 2, 2)]
    index = jnp.arange(length, dtype=jnp.int32)[None]
    first = jnp.zeros_like(index)
    compiled = jax.jit(jax.grad(lambda q, k, v: loss(q, k, v)[0], argnums=(0, 1, 2))).lower(*shapes).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * length * length * 4 / 4, temporary


def test_remat_keeps_outputs_and_gradients():
    model = model_of()
    tokens = ids(12)

    def loss(model, remat):
        return jnp.sum(jnp.sin(model.hidden(tokens, remat=remat)))

    plain, again = (jax.jit(jax.value_and_grad(partial(loss, remat=remat)))(model) for remat in (False, True))
    chex.assert_trees_all_close(jax.tree.leaves(again), jax.tree.leaves(plain), atol=1e-5, rtol=1e-5)


def test_a_model_of_shapes_costs_nothing():
    big = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, attention=PRESETS["lizard"])
    model = nnx.eval_shape(lambda: build(big, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) > 8.0e9


def test_positions_and_lengths_inside_segments():
    segments = jnp.asarray([[0, 1, 1, 1, 2, 2, 0, 0, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5]], jnp.int32)
    positions = [[0, 0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    chex.assert_trees_all_equal(segment_positions(segments), jnp.asarray(positions, jnp.int32))
    lengths = [[1, 3, 3, 3, 2, 2, 2, 2, 1], [9] * 9]
    chex.assert_trees_all_equal(segment_lengths(segments), jnp.asarray(lengths, jnp.int32))


def test_mistral_refuses_what_it_has_not():
    with pytest.raises(UserError, match="no biases"):
        build(ModelConfig(**{**CONFIG.__dict__, "architecture": "mistral", "qkv_bias": True}), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("preset", [None, "lizard", "lizard_paper", "lolcats"])
def test_padding_leaves_no_trace_in_the_state(preset):
    """Rows of unequal length in one batch, in chunks and single steps, give each row what it gives alone."""
    attention = None if preset is None else dataclasses.replace(PRESETS[preset], window=6, chunk=4)
    model = model_of(attention=attention, num_layers=1)
    tokens, lengths = ids(26, batch=3), (26, 1, 11)
    state, last = model.init_state(3, 32), [None] * 3
    for start, stop in ((0, 8), (8, 9), (9, 17), (17, 18), (18, 26)):
        count = np.clip(np.asarray(lengths) - start, 0, stop - start).astype(np.int32)
        out, state = extend(model, tokens[:, start:stop], state, count)
        out = np.asarray(out)
        for row in range(3):
            if count[row]:
                last[row] = out[row, count[row] - 1]
    after = np.asarray(extend(model, tokens[:, :1], state, np.ones(3, np.int32))[0])
    for row, length in enumerate(lengths):
        own, alone, at = model.init_state(1, 32), None, 0
        while at < length:  # in whole chunks and single steps, compiled once each
            size = 8 if length - at >= 8 else 1
            alone, own = extend(model, tokens[row : row + 1, at : at + size], own)
            at += size
        chex.assert_trees_all_close(last[row], np.asarray(alone)[0, -1], atol=2e-5, rtol=0)
        next_alone, _ = extend(model, tokens[row : row + 1, :1], own)
        chex.assert_trees_all_close(after[row, 0], np.asarray(next_alone)[0, 0], atol=2e-5, rtol=0)
