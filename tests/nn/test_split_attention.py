"""Layers whose key heads have different budgets: each class by its own definition, in every form, in linear memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import LizardConfig, ModelConfig
from lizard_jax.errors import UserError
from lizard_jax.nn import split_attention
from lizard_jax.nn.attention import mixer_of
from lizard_jax.nn.cache import KVCache
from lizard_jax.nn.context import LizardState
from lizard_jax.nn.lizard_attention import LizardMixer
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.nn.split_attention import SplitMixer, students_of
from pallas_kernels.sliding_window import reference, xla
from tests.nn.dense_lizard import dense_heads
from tests.nn.test_lizard_attention import all_of, draw, packed, relative_error

HEADS, KV, WIDTH = 6, 3, 6
ATTENTION = LizardConfig(window=8, chunk=16, beta_start=0.5, softmax_heads=("0.1",))


def make(attention: LizardConfig) -> SplitMixer:
    config = ModelConfig("llama", 11, 10, 8, 2, HEADS, KV, WIDTH, 64, attention=attention)
    mixer = mixer_of(config, 0, rngs=nnx.Rngs(0))
    assert isinstance(mixer, SplitMixer)
    rng = np.random.default_rng(0)
    state = nnx.state(mixer)
    nnx.update(mixer, jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), state))
    return mixer


def inputs(time: int):
    config = ModelConfig("llama", 11, 10, 8, 2, HEADS, KV, WIDTH, 64, attention=ATTENTION)
    return draw(LizardMixer(config, rngs=nnx.Rngs(0)), 2, time)


@pytest.mark.parametrize("reach", [0, 12, 200], ids=["keeps all", "long window", "window beyond the text"])
@pytest.mark.parametrize("memory", ["evicted", "none"])
def test_each_class_of_heads_is_its_own_definition(memory, reach):
    mixer = make(dataclasses.replace(ATTENTION, memory=memory, retrieval_window=reach))
    x, q, k, v = inputs(61)
    run = jax.jit(lambda m, s, *a: m(*a, segment_ids=s))
    for segments in (np.ones((2, 61), np.int32), np.asarray(packed(2, 61))):
        got = np.asarray(run(mixer, jnp.asarray(segments), x, q, k, v))
        short, long = [0, 1, 4, 5], [2, 3]
        own = dense_heads(mixer.short, x, q[:, :, short], k[:, :, [0, 2]], v[:, :, [0, 2]], segments)
        assert relative_error(got[:, :, short], own) < 1e-5
        exact = mixer.short if mixer.ring is None else mixer.ring
        everything = dataclasses.replace(exact.switches, memory="none", window=mixer.short.switches.window)
        if mixer.ring is None:
            everything = dataclasses.replace(everything, window=1000, retrieval_window=0)
            config = dataclasses.replace(exact.config, num_heads=2, kv_heads=1, attention=everything)
            exact = LizardMixer(config, rngs=nnx.Rngs(0))
        whole = dense_heads(exact, x, q[:, :, long], k[:, :, [1]], v[:, :, [1]], segments)
        assert relative_error(got[:, :, long], whole) < 1e-5


@pytest.mark.parametrize("more", [{}, {"softmax_heads": ("0.1",)}], ids=["", "and exact"])
def test_heads_with_budgets_of_their_own_are_mixers_of_their_own(more):
    attention = dataclasses.replace(ATTENTION, kept=3, budgets=("0.2=12+5", "0.0=8+0"), **{"softmax_heads": ()} | more)
    mixer = make(attention)
    assert mixer.kv_heads == (((0,), (2,), (1,)) if more else ((1,), (0,), (2,)))
    x, q, k, v = inputs(61)
    segments = jnp.asarray(packed(2, 61))
    run = jax.jit(lambda m, *a: m(*a, segment_ids=segments))
    got = run(mixer, x, q, k, v)
    for number, (kept, window) in enumerate(((0, 8), (5, 12)) if more else ((3, 8), (0, 8), (5, 12))):
        part, heads = mixer.linearized[number], mixer.q_heads[number]
        assert (part.switches.kept, part.switches.window, part.switches.budgets) == (kept, window, ())
        own = run(part, x, *mixer.part(number, q, k, v))
        assert relative_error(got[:, :, np.asarray(heads)], own) < 1e-5
    assert (mixer.long is None) == (not more)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "more",
    [
        {"softmax_heads": ("0.1",)},
        {"softmax_heads": (), "gate": "channel", "gate_bias": False, "state_heads": "query", "meta": "learned"},
    ],
    ids=["and exact", "of the query heads"],
)
def test_classes_in_one_call_are_the_same_function(more, monkeypatch):
    """Values and gradients, of packed documents, in float64; what keeps nothing stands alone."""
    pairs = () if more["softmax_heads"] else ("0.1=8+0",)
    mixer = make(dataclasses.replace(ATTENTION, chunk=8, kept=3, budgets=("0.2=8+5", *pairs), **more))
    state = jax.tree.map(lambda leaf: leaf.astype("float64"), nnx.state(mixer))
    graph = nnx.graphdef(mixer)
    given = [a.astype("float64") for a in inputs(45)]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=given[1].shape))
    segments = jnp.asarray(packed(2, 45))

    def loss(state, *arrays):
        heads = nnx.merge(graph, state)(*arrays, segment_ids=segments)
        return (heads * weights).sum(), heads

    def run():
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))(state, *given)

    (_, by_class), grads = run()
    calls = []
    monkeypatch.setattr(split_attention, "one_call_pays", lambda: True)
    monkeypatch.setattr(LizardMixer, "heads", _counted(LizardMixer.heads, calls))
    (_, together), grads_together = run()
    assert len(calls) == len(mixer.linearized) - 1
    np.testing.assert_allclose(together, by_class, rtol=1e-11, atol=1e-12)
    for a, b in zip(jax.tree.leaves(grads_together), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def _counted(function, calls):
    def call(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return call


def test_what_comes_together(monkeypatch):
    """Classes of one window that keep pairs, unless that would take more than twice what they need."""

    def calls(*budgets: str, **more) -> list[list[tuple[int, int]]]:
        attention = dataclasses.replace(ATTENTION, softmax_heads=(), chunk=8, kept=3, budgets=budgets, **more)
        mixer = make(attention)
        switches = [one.switches for one in mixer.linearized]
        return [[(switches[n].window, switches[n].kept) for n in call] for call in mixer._calls()]

    assert calls("0.0=8+5") == [[(8, 3)], [(8, 5)]]
    monkeypatch.setattr(split_attention, "one_call_pays", lambda: True)
    assert calls("0.0=8+5") == [[(8, 5), (8, 3)]]
    assert calls("0.0=8+5", "0.1=8+0") == [[(8, 5), (8, 3)], [(8, 0)]]
    assert calls("0.0=12+5", "0.1=8+2") == [[(12, 5)], [(8, 3), (8, 2)]]
    # Three heads of 58 would be 174, and 58, 12 and 11 are needed.
    assert calls("0.0=8+50", "0.1=8+4") == [[(8, 50), (8, 4)], [(8, 3)]]
    # A parameter of all heads cannot be put together.
    assert calls("0.0=8+5", gate="low_rank", gate_bias=False) == [[(8, 5)], [(8, 3)]]


FORMS = {
    "keeps all": {},
    "long window": {"retrieval_window": 12},
    "budgets": {"softmax_heads": (), "chunk": 8, "kept": 3, "budgets": ("0.2=12+5", "0.0=8+0")},
}


@pytest.mark.parametrize("form", FORMS)
def test_chunks_and_steps_are_the_full_forward(form):
    reach = form != "keeps all"
    mixer, time = make(dataclasses.replace(ATTENTION, **FORMS[form])), 46
    given = inputs(time)
    whole = np.asarray(jax.jit(lambda m, *a: m(*a))(mixer, *given))
    extend = jax.jit(lambda m, state, *a: m.extend(*a, state, all_of(a[0])))
    for lengths in ((11, 1, 1, 11, 1, 11, *[1] * 10), (11, 11, 11, *[1] * 13), (*[1] * 9, 11, 1, 1, 1, 11, 1, 11)):
        assert sum(lengths) == time
        state, got, at = mixer.init_state(2, time, jnp.float32), [], 0
        sizes = jax.tree.map(jnp.shape, state)
        for length in lengths:
            heads, state = extend(mixer, state, *(a[:, at : at + length] for a in given))
            got.append(np.asarray(heads))
            at += length
        assert relative_error(np.concatenate(got, axis=1), whole) < 1e-5, lengths
        assert jax.tree.map(jnp.shape, state) == sizes
    assert isinstance(state.long, {"keeps all": KVCache, "long window": LizardState, "budgets": type(None)}[form])
    if reach:
        mixer.init_state(2, None, jnp.float32)  # no length to be named: nothing grows
    else:
        with pytest.raises(UserError, match="max_length"):
            mixer.init_state(2, None, jnp.float32)


def test_exact_heads_see_no_more_than_the_teacher_did():
    """A reach beyond the teacher's own sliding window is that window, in a layer that slides."""
    attention = dataclasses.replace(ATTENTION, retrieval_window=20)

    def ring(layer: int, **more) -> int:
        config = ModelConfig("mistral", 11, 10, 8, 2, HEADS, KV, WIDTH, 64, attention=attention, **more)
        attention_of = dataclasses.replace(attention, softmax_heads=(f"{layer}.1",))
        mixer = mixer_of(dataclasses.replace(config, attention=attention_of), layer, rngs=nnx.Rngs(0))
        assert isinstance(mixer, SplitMixer)
        assert mixer.ring is not None
        return mixer.ring.switches.window

    assert ring(0) == 20
    assert ring(0, sliding_window=12) == 12
    assert ring(0, sliding_window=40) == 20
    assert [ring(layer, sliding_window=12, sliding_window_layers=(1,)) for layer in (0, 1)] == [20, 12]


def test_a_layer_is_what_its_heads_make_it():
    def kind(*heads: str, layer: int = 0, **more) -> object:
        attention = dataclasses.replace(ATTENTION, softmax_heads=heads, **more)
        return mixer_of(ModelConfig("llama", 11, 10, 8, 2, HEADS, KV, WIDTH, 64, attention=attention), layer,
                        rngs=nnx.Rngs(0))  # fmt: skip

    assert isinstance(kind("0.1", layer=1), LizardMixer)
    assert isinstance(kind("0.2", "0.0", "0.1"), SoftmaxMixer)
    ring = kind("0.2", "0.0", "0.1", retrieval_window=20)
    assert isinstance(ring, LizardMixer)
    assert students_of(ring) == []
    assert isinstance(kind("0.1", softmax_layers=(0,)), SoftmaxMixer)
    split = kind("0.1")
    assert isinstance(split, SplitMixer)
    (student,) = students_of(split)
    assert student.mixer is split.short
    assert isinstance(kind(budgets=("0.0=20+8", "0.1=20+8", "0.2=20+8")), LizardMixer)
    several = kind("0.1", budgets=("0.2=20+8",))
    assert isinstance(several, SplitMixer)
    first, second = students_of(several)
    assert (first.mixer, second.mixer) == (several.short, several.more[0])
    assert [(one.number, one.mixer.switches.window) for one in (first, second)] == [(0, ATTENTION.window), (1, 20)]


@pytest.mark.parametrize(
    ("budgets", "more", "words"),
    [
        (("0.0=8",), {}, "a head's budget is LAYER.HEAD=W\\+X"),
        (("0.0=0+4",), {}, "a window is 1 to"),
        (("0.0=9+4", "0.0=8+4"), {}, "names the key head 0.0 twice"),
        (("0.1=9+4",), {}, "both name the key head 0.1"),
        (("2.0=9+4", "0.3=9+4"), {"softmax_heads": ()}, "budgets names 0.3, 2.0, and the model has layers 0 to 1"),
        (("0.0=9+4",), {"memory": "all", "combine": "sum"}, "count kept pairs twice"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(budgets, more, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(
            "llama", 11, 10, 8, 2, HEADS, KV, WIDTH, 64,
            attention=dataclasses.replace(ATTENTION, **{"budgets": budgets} | more),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "more", "words"),
    [
        (("2.0",), {}, "softmax-heads names 2.0, and the model has layers 0 to 1 of key heads 0 to 2"),
        (("0.3",), {}, "softmax-heads names 0.3"),
        (("0",), {}, "a key head is LAYER.HEAD"),
        (("-1.0",), {}, "a key head is LAYER.HEAD"),
        ([f"{layer}.{head}" for layer in range(2) for head in range(KV)], {}, "names every key head"),
        (("0.1",), {"retrieval_window": 7}, "retrieval_window=7 is below the window of 8"),
        (("0.1",), {"retrieval_window": -1}, "retrieval_window=-1 must be"),
    ],
)  # fmt: skip
def test_heads_that_there_are_not_are_refused(heads, more, words):
    with pytest.raises(UserError, match=words):
        ModelConfig(
            "llama", 11, 10, 8, 2, HEADS, KV, WIDTH, 64,
            attention=dataclasses.replace(ATTENTION, softmax_heads=tuple(heads), **more),
        )  # fmt: skip


def test_one_choice_has_one_spelling():
    first, second = (
        dataclasses.replace(ATTENTION, softmax_heads=heads) for heads in (("10.0", "2.1"), ("2.01", "10.0"))
    )
    assert first == second
    assert first.softmax_heads == ("2.1", "10.0")
    # A head that is named with what all have needs no name.
    attention = dataclasses.replace(ATTENTION, budgets=("10.0=09+1", "2.2=8+0", "2.0=8+1"))
    assert attention.budgets == ("2.0=8+1", "10.0=9+1")


def test_a_long_window_runs_block_by_block(monkeypatch):
    """The same outputs and gradients as the definition's, and memory far below all scores at once."""
    monkeypatch.setattr(xla, "LARGEST_BLOCK", 16)
    rng = np.random.default_rng(0)
    time, window = 75, 40
    q = jnp.asarray(rng.normal(size=(2, time, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, window + time, 2, 8)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.repeat([[1, 2, 0, 1]], [20, 30, 5, 20], axis=1).repeat(2, axis=0), jnp.int32)
    near = jnp.concatenate([jnp.ones((2, window), jnp.int32), segments], axis=1)
    frequencies, sink = jnp.asarray([1.0, 0.3, 0.1, 0.01]), jnp.zeros((4,))

    def loss(attend):
        def of(q, k, v):
            y, n = attend(q, k, v, segments, near, sink, frequencies, window)
            return jnp.sum(jnp.sin(y)) + jnp.where(n > -1e29, n, 0.0).sum(), (y, n)

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True))

    (_, got), got_grads = loss(xla.attend)(q, k, v)
    (_, want), want_grads = loss(reference.IMPLEMENTATION.attend)(q, k, v)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        assert relative_error(a, b) < 1e-5
