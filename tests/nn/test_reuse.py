"""One trace for all layers of a kind: as many as there are kinds, and the same numbers."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lizard_jax.config import LizardConfig, ModelConfig
from lizard_jax.models import build
from lizard_jax.nn import reuse
from lizard_jax.nn.lizard_attention import LizardMixer

ATTENTION = LizardConfig(memory="none", window=4, chunk=4, kept=2, budgets=("1.0=4+3",), softmax_layers=(2,))
CONFIG = ModelConfig(
    architecture="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=5, num_heads=4, kv_heads=2,
    head_dim=4, max_positions=32, attention=ATTENTION,
)  # fmt: skip


def test_layers_of_a_kind_are_traced_once(monkeypatch):
    model, tokens = build(CONFIG, rngs=nnx.Rngs(0)), jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    kinds, plain = [], LizardMixer.heads

    def heads(self, *args, **kwargs):
        kinds.append((self.config.kv_heads, self.switches.kept))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LizardMixer, "heads", heads)

    def loss(model, tokens):
        return jnp.square(model(tokens)).mean()

    shared = reuse.scope()(loss)
    jax.jit(jax.value_and_grad(shared)).trace(model, tokens)
    # Layers 0, 3 and 4 are alike; layer 1 has two classes of heads.
    assert sorted(kinds) == [(1, 2), (1, 3), (2, 2)]
    value = jax.jit(shared)(model, tokens)
    for without in (contextlib.nullcontext(), reuse.apart()):
        kinds.clear()
        with without:
            alone = jax.jit(lambda *a: loss(*a))(model, tokens)
        assert len(kinds) == 5
        np.testing.assert_allclose(value, alone, rtol=1e-6)


def test_a_scope_inside_a_scope_shares_with_it_and_leaves_it():
    with reuse.scope():
        outer = reuse._run.get()
        with reuse.scope():
            assert reuse._run.get() is outer
        assert reuse._run.get() is outer is not None
        with reuse.apart():
            assert reuse._run.get() is not outer
    assert reuse._run.get() is None
