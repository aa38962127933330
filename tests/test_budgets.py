"""Budgets by key head: what each costs against autodiff of the whole model, and how bytes are split."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import LizardConfig, ModelConfig
from lizard_jax.convert import __main__ as convert
from lizard_jax.convert.load import load_hf
from lizard_jax.data.haystack import Measure
from lizard_jax.data.loader import Batch
from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import teacher_path
from lizard_jax.errors import UserError
from lizard_jax.models import build
from lizard_jax.nn.attention import mixer_of
from lizard_jax.nn.softmax_attention import SoftmaxMixer
from lizard_jax.select import __main__ as command
from lizard_jax.select import budgets
from lizard_jax.select.budgets import Curves, Size, measure, menu, size, spend, state_bytes
from lizard_jax.select.needs import mean_loss, texts
from tests.jitted import logits
from tests.test_select import SHAPE, teacher

SWITCHES = LizardConfig(window=8, chunk=8, feature_half=4)


def batch(time: int = 70) -> Batch:
    """Two rows: one document and a half, with padding and tokens that are not scored."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1024, (2, time + 1)).astype(np.int32)
    segments = np.ones((2, time), np.int32)
    segments[0, 40:] = 2
    segments[1, 60:] = 0
    mask = (rng.random((2, time)) < 0.8) & (segments != 0)
    return Batch(ids[:, :-1], ids[:, 1:], segments, mask.astype(np.float32))


def test_a_head_costs_what_its_error_makes_of_the_loss():
    """Against the slope of the loss by one layer's outputs, taken through the whole model at once."""
    model, text = teacher(), batch()
    told = []
    found = measure(model, [text, text], SWITCHES, tick=told.append)
    assert found.kept == [0, 2, 8, 32, 128]
    assert sum(told) == 6
    segments = jnp.asarray(text.segment_ids)
    attend = jax.jit(lambda mixer, *inputs: mixer(*inputs, segment_ids=segments))
    for layer in range(3):

        def run(extra, layer=layer):
            x, states = model.embed(jnp.asarray(text.inputs)), []
            for i, block in enumerate(model.layers):
                normed = block.attention_norm(x)
                heads = block.attention.mixer(normed, *block.attention.qkv(normed), segment_ids=segments)
                if i == layer:
                    states, heads = [normed, heads], heads + extra
                x = block.after_heads(x, heads)
            log = jax.nn.log_softmax(model.logits(model.norm(x)))
            nll = -jnp.take_along_axis(log, jnp.asarray(text.targets)[..., None], axis=-1)[..., 0]
            return (nll * text.loss_mask).sum(), states

        slope, (normed, whole) = jax.jit(jax.grad(run, has_aux=True))(jnp.zeros((2, 70, 4, 8)))
        qkv = model.layers[layer].attention.qkv(normed)
        for n, kept in enumerate(found.kept):
            alone = dataclasses.replace(SWITCHES, memory="none", kept=kept)
            mixer = mixer_of(dataclasses.replace(SHAPE, attention=alone), layer, rngs=nnx.Rngs(0))
            cost = ((attend(mixer, normed, *qkv) - whole) * slope).reshape(2, 70, 2, -1).sum(-1)
            want = 0.5 * np.square(cost).sum((0, 1)) / float(text.loss_mask.sum())
            np.testing.assert_allclose(found.array[layer, :, n], want, rtol=2e-3, atol=1e-9)
    assert (found.array[..., 0] > found.array[..., 3]).all()
    assert (found.array[..., -1] == 0).all()


def test_only_what_a_text_can_tell_apart_is_measured():
    assert menu(128, 2048) == [0, 32, 128, 512, 2048]
    assert menu(128, 600) == [0, 32, 128, 512]
    assert menu(2, 100) == [0, 2, 8, 32]  # a quarter of two rounds to none
    with pytest.raises(UserError, match="never leave the window of 70"):
        measure(teacher(), [batch()], dataclasses.replace(SWITCHES, window=70))


def falling(seed: int, kept: list[int], shape: ModelConfig = SHAPE) -> Curves:
    """Random curves that fall, some of them not convex."""
    drops = np.random.default_rng(seed).exponential(size=(shape.num_layers, shape.kv_heads, len(kept)))
    return Curves(window=8, kept=kept, errors=np.cumsum(drops[..., ::-1], axis=-1)[..., ::-1].tolist())


@pytest.mark.parametrize("seed", range(4))
def test_no_other_split_of_as_many_bytes_costs_less(seed):
    curves = falling(seed, [0, 2, 8])
    least = spend(curves, Size(2**30, 64), SHAPE, SWITCHES)
    assert {kept for _, kept in least.switches.own_budgets.values()} == {8}
    pair = 4 * SHAPE.head_dim + 8
    prices = [0, 4 * 9 + 2 * pair, 4 * 9 + 8 * pair]
    bare = state_bytes(dataclasses.replace(SHAPE, attention=SWITCHES), 64)
    heads = [(layer, head) for layer in range(3) for head in range(2)]
    splits = list(itertools.product(range(3), repeat=6))
    costs = [
        sum(curves.array[layer, head, n] for (layer, head), n in zip(heads, split, strict=True)) for split in splits
    ]
    bytes_ = [bare + sum(prices[n] for n in split) for split in splits]
    for limit in range(bare, bare + 6 * prices[2], 211):
        found = spend(curves, Size(limit, 64), SHAPE, SWITCHES)
        assert found.bytes <= limit
        config = dataclasses.replace(SHAPE, attention=found.switches)
        assert found.bytes == build(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).state_bytes(64)
        # Of all that take less than the dearest step below the limit.
        best = min(cost for cost, taken in zip(costs, bytes_, strict=True) if taken <= max(bare, limit - prices[2]))
        assert found.cost <= best + 1e-9


def test_heads_that_keep_all_cost_their_cache_and_get_no_pairs():
    switches = dataclasses.replace(SWITCHES, softmax_heads=("0.1",), softmax_layers=(2,))
    found = spend(falling(0, [0, 2]), Size(2**30, 64), SHAPE, switches)
    assert sorted(found.switches.own_budgets) == [(0, 0), (1, 0), (1, 1)]
    token, bare = 4 * SHAPE.head_dim, dataclasses.replace(SHAPE, attention=switches)
    assert state_bytes(bare, 100) - state_bytes(bare, 40) == 3 * 60 * token


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("16MiB", Size(2**24, 512)),
        ("1000", Size(1000, 512)),
        ("1.5KB@40", Size(1500, 40)),
        ("0.5GiB@8", Size(2**29, 8)),
    ],
)
def test_sizes_as_they_are_typed(text, want):
    assert size(text, SHAPE, SWITCHES) == want


def test_a_size_in_tokens_is_that_of_a_plain_window():
    alone = LizardConfig(memory="none", window=40)
    assert size("40tokens", SHAPE, SWITCHES).bytes == state_bytes(dataclasses.replace(SHAPE, attention=alone), 64)


@pytest.mark.parametrize("text", ["", "much", "-1MiB", "0", "3 apples", "0tokens", "1e9MiB", "16MiB@0", "nanMiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="give a size as 16MiB"):
        size(text, SHAPE, SWITCHES)


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        UserError, match=r"a state of 1,000 bytes \(--state-bytes\) is too small: windows, memory and exact heads"
    ):
        spend(falling(0, [0, 2]), Size(1000, 64), SHAPE, SWITCHES)
    with pytest.raises(UserError, match="3 x 2 key heads with a window of 8, and the model has 4 x 2 with 8"):
        spend(falling(0, [0, 2]), Size(2**20, 64), dataclasses.replace(SHAPE, num_layers=4), SWITCHES)
    with pytest.raises(UserError, match="measure them again"):
        spend(falling(0, [0, 2]), Size(2**20, 64), SHAPE, dataclasses.replace(SWITCHES, window=9))


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"format": 1, "window": 8, "kept": [0], "errors": [[[NaN]]]}',
     '{"format": 1, "window": 8, "kept": [0, 1], "errors": [[[1.0]]]}',
     '{"format": 1, "window": 8, "kept": [1, 0], "errors": [[[1.0, 2.0]]]}',
     '{"format": 1, "window": 8, "kept": [0], "errors": [[[1.0], [1.0]], [[1.0]]]}'],
)  # fmt: skip
def test_what_are_no_curves_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "budgets.json").write_text(content)
    with pytest.raises(UserError, match=r"holds no curves of key heads|budgets\.json"):
        budgets.read(tmp_path / "budgets.json")


def test_the_command_measures_scores_and_writes_what_linearize_reads(tmp_path, capsys):
    text = tmp_path / "text.txt"
    words = np.random.default_rng(0).choice(["def f(x):\n", "return x + 1\n", "class A:\n", "pass\n"], (4, 120))
    text.write_text("<|endoftext|>".join("".join(row) for row in words))
    out, student = tmp_path / "needs", tmp_path / "student"
    line = ["embedded", "--by", "error", "--data", str(text), "--window", "16", "--length", "80"]
    assert command.main([*line, "--samples", "1", "--scored", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"curves={out / 'budgets.json'}"
    result = json.loads((out / "result.json").read_text())
    assert [row["tokens"] for row in result["rows"]] == [24, 32, 64]
    assert all(row["loss"] > 0 for row in result["rows"])
    assert (out / "budgets.png").read_bytes().startswith(b"\x89PNG")

    summary = convert.linearize(
        str(teacher_path()), str(student), preset="lizard", window=16, data="embedded", length=80, memory="none",
        state_bytes="32tokens", curves=str(out / "budgets.json"),
    )  # fmt: skip
    assert summary.startswith("state: ")
    assert list(load_hf(student).config.attention.budgets) == result["rows"][1]["budgets"]
    with pytest.raises(UserError, match="leave out --kept"):
        convert.linearize(
            str(teacher_path()), str(student / "x"), preset="lizard", window=16, data="embedded", length=80, kept=3,
            state_bytes="32tokens",
        )  # fmt: skip
    assert command.main(["embedded", "--by", "error"]) == 2
    assert "needs --data" in capsys.readouterr().err


@pytest.mark.parametrize("switches", [None, dataclasses.replace(SWITCHES, memory="none", kept=3)])
def test_the_loss_told_is_that_of_the_student(switches):
    """On two texts, over what stands behind the window, with the final norm's own weights."""
    model = teacher()
    model.norm.weight[...] = jnp.linspace(0.5, 2.0, SHAPE.hidden_size)
    texts = list(np.random.default_rng(5).integers(0, SHAPE.vocab_size, (2, 40)).astype(np.int32))
    got = mean_loss(model, switches, texts, 8)
    for index, block in enumerate(model.layers):
        block.attention.mixer = mixer_of(dataclasses.replace(SHAPE, attention=switches), index, rngs=nnx.Rngs(0))
    log = jax.nn.log_softmax(logits(model, np.stack(texts)))
    want = [-np.asarray(log)[row, t - 1, ids[t]] for row, ids in enumerate(texts) for t in range(9, 40)]
    assert got == pytest.approx(np.mean(want), rel=1e-5)


def test_the_embedded_text_by_its_name():
    found = texts("embedded", "<|endoftext|>", Measure(load_tokenizer(teacher_path())), 90, 5)
    assert [len(ids) for ids in found] == [90] * 4


def test_a_teacher_that_is_not_finite_is_named():
    model = teacher()
    model.layers[1].attention.v_proj.kernel[...] = jnp.full_like(model.layers[1].attention.v_proj.kernel[...], jnp.nan)
    assert isinstance(model.layers[1].attention.mixer, SoftmaxMixer)
    with pytest.raises(
        UserError, match="for the teacher's layers/1/attention/v_proj/kernel holds NaN or infinity; its weights"
    ):
        measure(model, [batch(20)], SWITCHES)
