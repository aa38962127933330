"""The three forms of Lizard attention: the dense definition, the chunked forward, steps from a fixed-size state."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import PRESETS, LizardConfig, ModelConfig
from lizard_jax.errors import UserError
from lizard_jax.nn.lizard_attention import LizardMixer
from tests.nn.dense_lizard import dense_heads

W, M, C = 8, 4, 16
SMALL = {name: dataclasses.replace(config, window=W, meta_tokens=M, chunk=C) for name, config in PRESETS.items()}
VARIANTS = SMALL | {
    "learned meta": dataclasses.replace(SMALL["lizard"], meta="learned"),
    "evicted prefix": dataclasses.replace(SMALL["lizard"], meta="prefix", beta_start=1.0),
    "window only": dataclasses.replace(SMALL["lizard"], memory="none"),
    "mamba2": dataclasses.replace(SMALL["lizard"], gate="mamba2", gate_bias=False),
    "low_rank": dataclasses.replace(SMALL["lizard"], gate="low_rank", gate_bias=False),
    "channel, query states": dataclasses.replace(
        SMALL["lizard"], gate="channel", gate_bias=False, state_heads="query"
    ),
    "pooled, narrow features": dataclasses.replace(SMALL["lizard"], gate="pooled", gate_bias=False, feature_half=3),
    "exp with rope in both": dataclasses.replace(SMALL["lizard"], linear_rope=True, beta_start=0.0),
    "one-token window": dataclasses.replace(SMALL["lizard"], window=1),
}  # fmt: skip


def make_mixer(switches: LizardConfig, *, heads=4, kv_heads=2, width=6, seed=0) -> LizardMixer:
    config = ModelConfig(
        architecture="llama", vocab_size=11, hidden_size=10, intermediate_size=8, num_layers=1, num_heads=heads,
        kv_heads=kv_heads, head_dim=width, max_positions=64, attention=switches,
    )  # fmt: skip
    mixer = LizardMixer(config, rngs=nnx.Rngs(seed))
    # Move every parameter off its start, so that none hides in a zero.
    leaves, tree = jax.tree.flatten(nnx.state(mixer))
    rng = np.random.default_rng(seed)
    moved = [leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype) for leaf in leaves]
    nnx.update(mixer, jax.tree.unflatten(tree, moved))
    return mixer


def draw(mixer: LizardMixer, batch: int, time: int, seed: int = 1):
    """Inputs in numpy, whose slices need no compiling."""
    rng = np.random.default_rng(seed)
    config = mixer.config
    shapes = [(config.hidden_size,), (config.num_heads, config.head_dim), *[(config.kv_heads, config.head_dim)] * 2]
    return tuple(rng.normal(size=(batch, time, *shape)).astype(np.float32) for shape in shapes)


def packed(batch: int, time: int) -> jnp.ndarray:
    """Documents of lengths around the borders, and padding at the end of the last row."""
    rows = [np.repeat(np.arange(1, 9), [1, W, W + 1, C - 1, M, C + 3, M + 1, 64])[:time] for _ in range(batch)]
    rows[-1] = np.ones(time, int)
    rows[-1][-5:] = 0
    return jnp.asarray(np.stack(rows), jnp.int32)


def all_of(x):
    """Lengths that say every token of ``x`` [B, T, D] is real."""
    return jnp.full((x.shape[0],), x.shape[1], jnp.int32)


def relative_error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


@pytest.mark.parametrize("name", VARIANTS)
def test_chunked_forward_is_the_dense_definition(name):
    mixer = make_mixer(VARIANTS[name])
    inputs = draw(mixer, 2, 91)
    for segments in (None, packed(2, 91)) if name == "lizard" else (packed(2, 91),):
        got = jax.jit(lambda m, *a, s=segments: m(*a, segment_ids=s))(mixer, *inputs)
        want = dense_heads(mixer, *inputs, np.ones((2, 91), int) if segments is None else segments)
        assert relative_error(got, want) < 1e-5
        chex.assert_tree_all_finite(got)


@pytest.mark.parametrize("name", [*SMALL, "evicted prefix", "learned meta", "channel, query states"])
def test_prefill_in_chunks_then_steps_is_the_full_forward(name):
    mixer = make_mixer(VARIANTS[name])
    time = 2 * C + W + 4
    inputs = draw(mixer, 2, time)
    whole = np.asarray(jax.jit(lambda m, *a: m(*a))(mixer, *inputs))
    extend = jax.jit(lambda m, state, *a: m.extend(*a, state, all_of(a[0])))
    sizes = {jax.tree.map(jnp.shape, mixer.init_state(2, None, jnp.float32)).__repr__()}
    # A chunk that begins at the borders of blocks and of what is kept, and beside them; ours ends there as well, in
    # chunks that are compiled each.
    for border in sorted({b + d for b in (M, W, C) for d in (-1, 0, 1)}):
        state, got, at = mixer.init_state(2, None, jnp.float32), [], 0
        start = [border] if name == "lizard" else [1] * border
        for length in (*start, *[1] * 3, C, *[1] * (time - border - C - 3)):
            piece = tuple(a[:, at : at + length] for a in inputs)
            heads, state = extend(mixer, state, *piece)
            got.append(np.asarray(heads))
            at += length
        assert relative_error(np.concatenate(got, 1), whole) < 1e-5, border
        sizes.add(jax.tree.map(jnp.shape, state).__repr__())
    assert len(sizes) == 1  # the state never grows


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_finite_under_extreme_inputs_and_gates(name):
    mixer = make_mixer(SMALL[name])
    x, q, k, v = draw(mixer, 1, 40)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def grads(m, q, k, x):
        return (m(x, q, k, v, segment_ids=packed(1, 40)) ** 2).sum()

    for scale in np.float32([0.0, 1.0, 60.0]):
        chex.assert_tree_all_finite(jax.tree.leaves(grads(mixer, q * scale, k * scale, x * scale)))


def test_a_document_is_alone_in_a_packed_row():
    mixer = make_mixer(SMALL["lizard"])
    inputs = draw(mixer, 1, 60)
    segments = jnp.asarray([[1] * 23 + [2] * 37], jnp.int32)
    together = jax.jit(lambda m, *a: m(*a, segment_ids=segments))(mixer, *inputs)
    alone = jax.jit(lambda m, *a: m(*a))(mixer, *(a[:, 23:] for a in inputs))
    assert relative_error(together[:, 23:], alone) < 1e-5


def test_angles_are_exact_far_from_the_start():
    mixer = make_mixer(SMALL["lizard"])
    inputs = draw(mixer, 1, 3 * W)
    extend = jax.jit(lambda m, state, *a: m.extend(*a, state, all_of(a[0])))
    _, state = extend(mixer, mixer.init_state(1, None, jnp.float32), *inputs)
    far_state = dataclasses.replace(state, position=state.position + 10_000_000)
    here, _ = extend(mixer, state, *inputs)
    there, _ = extend(mixer, far_state, *inputs)
    chex.assert_trees_all_equal(here, there)


@pytest.mark.parametrize("length", [1, W - 1, W])
def test_nothing_has_left_the_window_yet(length):
    """Inside the first W tokens the linear branch is empty, so ours is the window alone."""
    mixer = make_mixer(SMALL["lizard"])
    alone = make_mixer(VARIANTS["window only"])
    inputs = draw(mixer, 1, length)
    run = jax.jit(lambda m, *a: m(*a))
    chex.assert_trees_all_close(run(mixer, *inputs), run(alone, *inputs), rtol=1e-6)


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({"memory": "all"}, "counts the window's tokens twice"),
        ({"memory": "none", "combine": "sum"}, "no linear branch"),
        ({"gate": "pooled"}, "gate_bias"),
        ({"window": 0}, "window=0"),
        ({"act": "relu"}, "choose from softmax, exp"),
    ],
)
def test_refused_switches_say_why(switches, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(PRESETS["lizard"], **switches)
