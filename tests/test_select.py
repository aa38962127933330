"""Ranking key heads: scores against the dense attention maps, choices against the students they stand for."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import LizardConfig, ModelConfig
from lizard_jax.data.haystack import Measure
from lizard_jax.data.passkey import PasskeySet
from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import teacher_path
from lizard_jax.errors import UserError
from lizard_jax.eval.maps import layer_maps
from lizard_jax.models import build
from lizard_jax.select import __main__ as command
from lizard_jax.select import choice, rank
from lizard_jax.select.needles import make, needles
from tests.jitted import logits

SHAPE = ModelConfig("llama", 1024, 32, 48, 3, 4, 2, 8, 512)
WINDOW, LENGTH = 16, 90


def teacher(**changes):
    model = build(dataclasses.replace(SHAPE, **changes), rngs=nnx.Rngs(0))
    # Start values of 0.02 would make every head look everywhere alike.
    return jax.tree.map(lambda x: x * 12 if x.ndim == 2 else x, model)


@pytest.fixture(scope="module")
def measure():
    return Measure(load_tokenizer(teacher_path()))


@pytest.fixture(scope="module")
def texts(measure):
    return make(measure, LENGTH, 3, seed=0)


def test_needles_are_where_they_are_said_to_be(measure):
    examples = PasskeySet(measure, LENGTH, 2, (5, 8), "plain", 3)
    made = needles(examples, range(4))
    for i in range(4):
        answer = examples[i].answer
        rows, real = made.rows[i], made.real[i]
        np.testing.assert_array_equal(made.tokens[i][rows[real] + 1], made.answers[i][real])
        assert measure.tokenizer.decode(made.answers[i][real]).strip() == answer
        assert answer in measure.tokenizer.decode(made.tokens[i][made.hidden[i]])
        assert len(measure.tokenizer.decode(made.tokens[i][made.hidden[i]]).strip(" .")) <= len(answer) + 1
        assert np.flatnonzero(made.hidden[i]).max() < rows[real].min()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 20, "sliding_window_layers": (1,)}], ids=["", "slides"])
def test_retrieval_scores_are_the_attention_maps_between_answer_and_needle(texts, changes):
    model = teacher(architecture="mistral", **changes)
    got = rank.retrieval_scores(model, texts)
    want = np.zeros_like(got)
    for i, ids in enumerate(texts.tokens):
        x = model.embed(jnp.asarray(ids[None]))
        for layer, block in enumerate(model.layers):
            maps = layer_maps(block.attention, block.attention_norm(x)).window
            seen = maps[:, texts.rows[i][texts.real[i]]][:, :, texts.hidden[i]].sum(axis=-1).mean(axis=-1)
            want[layer] += seen.reshape(2, 2).mean(axis=-1) / len(texts.tokens)
            x = block(x)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert want.max() > 0.02


def loss_of(model, ids):
    log = jax.nn.log_softmax(logits(model, ids[None]))[0]
    return -float(log[jnp.arange(WINDOW, len(ids) - 1), ids[WINDOW + 1 :]].mean())


def test_a_score_is_the_student_with_these_heads(texts):
    model = teacher()
    plain = [np.asarray(jax.random.randint(jax.random.key(n), (70,), 0, 1024), np.int32) for n in range(2)]
    for heads in ((), ("0.1", "2.0", "2.1")):
        attention = LizardConfig(memory="none", window=WINDOW, softmax_heads=heads)
        student = build(dataclasses.replace(SHAPE, attention=attention), rngs=nnx.Rngs(0))
        nnx.update(student, nnx.state(model))
        keep = np.zeros((3, 2), bool)
        for name in heads:
            keep[tuple(map(int, name.split(".")))] = True
        found = rank.score(model, keep, texts, plain, window=WINDOW)
        assert found.loss == pytest.approx(np.mean([loss_of(student, ids) for ids in plain]), abs=2e-5)
        logs = [jax.nn.log_softmax(logits(student, ids[None]))[0] for ids in texts.tokens]
        nats = [
            -np.asarray(log)[rows[real], answers[real]]
            for log, rows, answers, real in zip(logs, texts.rows, texts.answers, texts.real, strict=True)
        ]
        assert found.answer_loss == pytest.approx(np.concatenate(nats).mean(), abs=2e-5)


def test_a_needle_counts_where_every_token_of_its_answer_is_the_likeliest(texts):
    model, everything = teacher(), np.ones((3, 2), bool)
    log = [np.asarray(logits(model, ids[None]))[0].argmax(-1) for ids in texts.tokens]
    answers = np.stack([row[rows] for row, rows in zip(log, texts.rows, strict=True)])
    answers[0, 0] = (answers[0, 0] + 1) % 1024
    found = rank.score(model, everything, dataclasses.replace(texts, answers=answers), window=WINDOW)
    assert found.needles == pytest.approx(2 / 3)


def test_cutting_one_head_costs_what_its_student_loses():
    model = teacher()
    ids = np.asarray(jax.random.randint(jax.random.key(5), (60,), 0, 1024), np.int32)
    told = []
    got = rank.cut_losses(model, [ids], window=WINDOW, tick=told.append)
    want = jax.nn.log_softmax(logits(model, ids[None]))[0, WINDOW:]
    everything = [f"{layer}.{head}" for layer in range(3) for head in range(2)]
    for layer in range(3):
        for head in range(2):
            heads = tuple(name for name in everything if name != f"{layer}.{head}")
            attention = LizardConfig(memory="none", window=WINDOW, softmax_heads=heads)
            student = build(dataclasses.replace(SHAPE, attention=attention), rngs=nnx.Rngs(0))
            nnx.update(student, nnx.state(model))
            ours = jax.nn.log_softmax(logits(student, ids[None]))[0, WINDOW:]
            kl = float((jnp.exp(want) * (want - ours)).sum(axis=-1).mean())
            assert got[layer, head] == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert sum(told) == 6


def test_the_best_heads_are_named_in_order(tmp_path):
    found = choice.ranking("retrieval", np.asarray([[0.1, 0.5], [0.3, 0.0], [0.2, 0.5]]))
    assert found.names[:4] == ["0.1", "2.1", "1.0", "2.0"]
    (tmp_path / "heads.json").write_text(choice.text(found))
    assert choice.read(tmp_path / "heads.json") == found
    assert choice.best(found, "2", SHAPE) == ("0.1", "2.1")
    assert choice.best(found, "50%", SHAPE) == ("0.1", "2.1", "1.0")
    assert choice.best(found, "1%", SHAPE) == ("0.1",)
    assert choice.asked("heads.json") == ("heads.json", "10%")
    assert choice.asked("c:/x:y/heads.json:12") == ("c:/x:y/heads.json", "12")
    for count, words in (("6", "leave nothing"), ("99%", "leave nothing")):
        with pytest.raises(UserError, match=words):
            choice.best(found, count, SHAPE)
    with pytest.raises(UserError, match="of 3 layers of 2 key heads, and the model has 4 of 2"):
        choice.best(found, "2", dataclasses.replace(SHAPE, num_layers=4))
    for spec in ("heads.json:0", "heads.json:100%", "heads.json:0%"):
        with pytest.raises(UserError, match="give a number"):
            choice.asked(spec)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"format": 1, "by": "loss", "layers": 1, "kv_heads": 2, "scores": [[1.0]]}',
     '{"format": 1, "by": "loss", "layers": 1, "kv_heads": 1, "scores": [[NaN]]}',
     '{"format": 1, "by": "loss", "layers": 1, "kv_heads": 1, "scores": [["1"]]}'],
)  # fmt: skip
def test_what_is_no_ranking_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "heads.json").write_text(content)
    with pytest.raises(UserError, match=r"no ranking of key heads|heads\.json"):
        choice.read(tmp_path / "heads.json")


def test_the_command_ranks_scores_and_writes(tmp_path, capsys):
    out = tmp_path / "heads"
    line = ["embedded", "--window", "32", "--length", "80", "--samples", "1", "--scored", "1"]
    assert command.main([*line, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"heads={out / 'heads.json'}"
    rows = json.loads((out / "result.json").read_text())["rows"]
    assert [row["heads"] for row in rows] == [0, 1, 2, 12]
    assert rows[-1]["cache"] == 1.0
    assert (out / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert choice.read(out / "heads.json").layers == 6


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--length", "20", "--window", "32"], "never leaves the window of 32"),
        (["--samples", "0"], "--samples is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--by", "loss"], "--by loss needs --data"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--filler", "nowhere.txt"], "cannot read the filler nowhere.txt"),
        (["--length", "20", "--window", "8"], "is too short"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line(capsys, flags, words):
    assert command.main(["embedded", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
