"""Kept pairs against their definition, token by token in float64 numpy, and every way of reading a text alike."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lizard_jax.config import LizardConfig
from lizard_jax.errors import UserError
from lizard_jax.nn.kept_pairs import FADE
from tests.nn.dense_lizard import _f64, _log_gates, _phi, _rotated
from tests.nn.test_lizard_attention import all_of, draw, make_mixer, packed, relative_error

W, M, C = 8, 3, 4
OURS = LizardConfig(window=W, meta_tokens=M, chunk=C, kept=5, beta_start=0.5)
VARIANTS = {
    "ours": OURS,
    "window only": dataclasses.replace(OURS, memory="none"),
    "one pair": dataclasses.replace(OURS, kept=1),
    "more pairs than leave": dataclasses.replace(OURS, kept=40),
    "a window of one block": dataclasses.replace(OURS, chunk=W),
    "chunks longer than the window": dataclasses.replace(OURS, chunk=2 * W),
    "sink, query states, rope in memory": dataclasses.replace(OURS, meta="sink", state_heads="query", linear_rope=True),
    "learned, gates a feature": dataclasses.replace(OURS, meta="learned", gate="channel", gate_bias=False),
    "sum, no meta, softmax maps": dataclasses.replace(OURS, meta="none", combine="sum", act="softmax"),
    "no rope": dataclasses.replace(OURS, window_rope=False),
}


def by_the_definition(mixer, x, q, k, v, segments):
    x, q, k, v = (np.asarray(a, np.float64) for a in (x, q, k, v))
    return np.stack([_row(mixer, *row) for row in zip(x, q, k, v, np.asarray(segments), strict=True)])


def _row(mixer, x, q, k, v, seg):
    s, theta, time = mixer.switches, mixer.config.rope.theta, len(x)
    heads, groups, width = q.shape[1], k.shape[1], q.shape[2]
    group, block = heads // groups, min(s.chunk, s.window)
    begins = np.zeros(time, int)
    for t in range(1, time):
        begins[t] = begins[t - 1] if seg[t] == seg[t - 1] else t
    out = np.zeros_like(q)
    for g in range(groups):
        kept, received, entered = [], np.zeros(time), {}  # entered: the first gate that a token in the state decays by
        for i in range(time):
            document = list(range(begins[i], i + 1)) if seg[i] else []
            prefix = {j for j in document if s.meta == "prefix" and j - begins[i] < s.meta_tokens}
            if i % block == 0 and seg[i]:
                received *= FADE
                leaving = [j for j in range(i - s.window, i - s.window + block) if j in document and j not in prefix]
                living = [j for j in kept if j in document]
                order = sorted([*living, *leaving], key=lambda j: -received[j])
                for j in set(living) - set(order[: s.kept]):
                    entered[j] = i
                kept = order[: s.kept]
            gone = i - s.window
            if seg[i] and gone in document and gone not in prefix and gone not in kept:
                entered.setdefault(gone, i + 1)
            if not seg[i]:
                continue
            near = [j for j in document if j > i - s.window]
            pairs = [j for j in kept if j <= i - s.window and j in document]
            first = [j for j in prefix if j <= i - s.window]
            for n in range(g * group, (g + 1) * group):
                at = i - begins[i]

                def score(j, at, n=n, i=i, g=g):
                    if not s.window_rope:
                        return q[i, n] @ k[j, g] / width**0.5
                    turned = _rotated(q[i, n][None], np.array([at]), theta)[0]
                    return turned @ _rotated(k[j, g][None], np.array([j - begins[i]]), theta)[0] / width**0.5

                logs = [score(j, at) for j in [*near, *pairs]]
                logs += [score(j, min(at, mixer.config.max_positions - 1)) for j in first]
                values = [v[j, g] for j in [*near, *pairs, *first]]
                if s.meta == "sink":
                    logs.append(_f64(mixer.sink)[n])
                    values.append(np.zeros(width))
                if s.meta == "learned":
                    logs += list(q[i, n] @ _f64(mixer.meta_k)[:, g].T / width**0.5)
                    values += list(_f64(mixer.meta_v)[:, g])
                weights = np.exp(logs)
                for j, weight in zip([*near, *pairs], weights, strict=False):
                    received[j] += weight / weights.sum()
                y_w, n_w = weights @ np.stack(values) / weights.sum(), np.log(weights.sum())
                if s.memory == "none":
                    out[i, n] = y_w
                    continue
                state = n if mixer.state_heads == heads else g
                ql, kl = q[:, n], k[:, g]
                if s.linear_rope:
                    ql, kl = (_rotated(a, np.arange(time) - begins, theta) for a in (ql, kl))
                gates = _log_gates(mixer, x, k[:, g], state)
                phi_q, phi_k = _phi(mixer, mixer.phi_q, ql, n), _phi(mixer, mixer.phi_k, kl, state)
                held = [j for j in document if entered.get(j, time + 1) <= i + 1]
                w = np.array([(phi_q[i] * np.exp(gates[entered[j] : i + 1].sum(0)) * phi_k[j]).sum() for j in held])
                y_g = w @ v[held, g] / w.sum() if held else np.zeros(width)
                if s.combine == "sum":
                    out[i, n] = y_g + _f64(mixer.alpha) * y_w
                elif not held:
                    out[i, n] = y_w
                else:
                    share = 1 / (1 + np.exp(n_w - np.log(w.sum()) - _f64(mixer.beta)[n]))
                    out[i, n] = share * y_g + (1 - share) * y_w
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_the_forward_is_the_definition(name):
    mixer = make_mixer(VARIANTS[name])
    inputs = draw(mixer, 2, 45)
    # Steeper scores: else the attention that tokens receive hardly differs.
    inputs = (inputs[0], 2 * inputs[1], *inputs[2:])
    run = jax.jit(lambda m, s, *a: m(*a, segment_ids=s))
    for segments in (np.ones((2, 45), np.int32), np.asarray(packed(2, 45))):
        got = run(mixer, jnp.asarray(segments), *inputs)
        assert relative_error(got, by_the_definition(mixer, *inputs, segments)) < 1e-5


@pytest.mark.parametrize("name", ["ours", "window only", "a window of one block", "learned, gates a feature"])
def test_chunks_and_steps_are_the_full_forward(name):
    mixer, time = make_mixer(VARIANTS[name]), 41
    inputs = draw(mixer, 2, time)
    inputs = (inputs[0], 2 * inputs[1], *inputs[2:])
    whole = np.asarray(jax.jit(lambda m, *a: m(*a))(mixer, *inputs))
    extend = jax.jit(lambda m, state, *a: m.extend(*a, state, all_of(a[0])))
    # Few lengths, each compiled once, in orders that end everywhere in a block and a window; ours in two longer ones.
    orders = (13, 1, 13, 1, 13), (1, 1, 13, *[1] * 7, 13, *[1] * 6), (*[1] * 9, 13, 13, *[1] * 6)
    if name == "ours":
        orders = (7, 1, 1, 13, 1, 7, 1, 7, 1, 1, 1), (1, 1, 13, 7, 7, *[1] * 5, 7), (*[1] * 9, 13, 7, 1, 1, 1, 7, 1, 1)
    for lengths in orders:
        assert sum(lengths) == time
        state, got, at = mixer.init_state(2, None, jnp.float32), [], 0
        for length in lengths:
            heads, after = extend(mixer, state, *(a[:, at : at + length] for a in inputs))
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)  # it never grows
            state = after
            got.append(np.asarray(heads))
            at += length
        assert relative_error(np.concatenate(got, 1), whole) < 1e-5, lengths


def test_rows_of_different_lengths_stand_where_they_would_alone():
    mixer = make_mixer(OURS)
    inputs = draw(mixer, 3, 30)
    lengths = [30, 0, 13]
    extend = jax.jit(lambda m, state, lengths, *a: m.extend(*a, state, lengths))
    _, state = extend(mixer, mixer.init_state(3, None, jnp.float32), jnp.asarray([5, 11, 2], jnp.int32), *inputs)
    heads, after = extend(mixer, state, jnp.asarray(lengths, jnp.int32), *inputs)
    for row, count in enumerate(lengths):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], state)
        own = tuple(a[row : row + 1, : max(count, 1)] for a in inputs)
        want, want_after = extend(mixer, alone, jnp.asarray([count], jnp.int32), *own)
        got_after = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], after)
        chex.assert_trees_all_close(got_after, want_after, atol=2e-5, rtol=1e-4)
        if count:
            chex.assert_trees_all_close(heads[row : row + 1, :count], want, atol=2e-5, rtol=1e-4)


def test_a_kept_pair_outlives_any_window_and_its_distance_is_cut_at_the_teacher_s_context():
    """One key that every query looks for stays exact at 4 and 16 times the context, turned as if at its end."""
    mixer = make_mixer(dataclasses.replace(OURS, memory="none", meta="none", kept=2))
    context = mixer.config.max_positions
    time = 16 * context + 2 * C
    rng = np.random.default_rng(0)
    x, q, k, v = (np.array(a) for a in draw(mixer, 1, time))
    k[:], q[:] = 0.02 * k, rng.normal(0, 0.02, q.shape)
    # The pair that turns slowest carries the key, so that it is found at any distance.
    half = q.shape[-1] // 2
    q[..., half - 1] += 4.0
    k[:, 5, :, half - 1] += 9.0
    run = jax.jit(lambda m, *a: m(*a))
    heads = np.asarray(run(mixer, *(jnp.asarray(a) for a in (x, q, k, v))))
    for at in (W + 10, 4 * context, 16 * context):
        distance = min(at - 5, context - C + at % C)
        near = list(range(at - W + 1, at + 1))
        for n in range(q.shape[2]):
            g = n // 2
            logs = [
                _rotated(q[:1, at, n].astype(np.float64), np.array([d]), 10000.0)[0] @ k[0, j, g] / q.shape[-1] ** 0.5
                for j, d in [(5, distance), *((j, at - j) for j in near)]
            ]
            weights = np.exp(logs) / np.exp(logs).sum()
            assert weights[0] > 0.5
            # The other kept pair weighs next to nothing.
            np.testing.assert_allclose(
                heads[0, at, n], weights @ v[0, [5, *near], g], atol=0.35 * weights[1:].max() + 0.02
            )


def test_gradients_are_those_of_the_choice_held_fixed():
    mixer = make_mixer(OURS)
    inputs = tuple(a.astype(jnp.float32) for a in draw(mixer, 1, 26))

    def loss(q, k, v):
        return jnp.sum(jnp.sin(mixer(inputs[0], q, k, v)))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs[1:])
    chex.assert_tree_all_finite(grads)
    rng = np.random.default_rng(1)
    for place, grad in enumerate(grads):
        direction = jnp.asarray(rng.normal(size=grad.shape), jnp.float32)
        step = 1e-3

        def moved(sign, place=place, direction=direction, step=step):
            args = list(inputs[1:])
            args[place] = args[place] + sign * step * direction
            return jax.jit(loss)(*args)

        slope = (moved(1) - moved(-1)) / (2 * step)
        assert float(slope) == pytest.approx(float((grad * direction).sum()), rel=2e-2, abs=2e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kept": -1}, "kept=-1 must be"),
        ({"kept": 4, "memory": "all", "combine": "sum"}, "would count kept pairs twice"),
    ],
)
def test_pairs_that_cannot_be_kept_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(OURS, **{"kept": 0} | change)
