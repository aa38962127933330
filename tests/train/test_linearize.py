"""``convert.py linearize``: a student that was not trained."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lizard_jax
from lizard_jax.convert import __main__ as convert
from lizard_jax.convert.flax_dir import save_flax
from lizard_jax.convert.load import load_hf
from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import corpus, teacher_path
from lizard_jax.errors import UserError
from lizard_jax.generate.conversation import load, save
from lizard_jax.generate.engine import Generation
from lizard_jax.generate.sampling import Sampling
from lizard_jax.nn.params import BaseParam
from lizard_jax.select import choice
from tests.jitted import logits
from tests.shallow import shallow


def test_linearize_writes_a_student_that_was_not_trained(tmp_path):
    """The embedded teacher: its weights untouched, a start measured on its own text, and a loss near its own."""
    teacher = load_hf(teacher_path())
    summary = convert.linearize(
        str(teacher_path()), str(tmp_path / "student"), preset="lizard", window=32, data="embedded", length=256
    )
    assert "memory's share" in summary
    student = load_hf(tmp_path / "student")
    assert student.config.attention is not None
    assert student.config.attention.window == 32
    chex.assert_trees_all_equal(nnx.state(student, BaseParam), nnx.state(teacher, BaseParam))
    text = next(iter(corpus.documents("held_out")))
    ids = jnp.asarray(load_tokenizer(teacher_path())(text)["input_ids"][:257])[None]

    def loss(model):
        log_p = jax.nn.log_softmax(logits(model, ids[:, :-1]))
        return -float(jnp.take_along_axis(log_p, ids[:, 1:, None], -1)[:, 64:].mean())

    window = dataclasses.replace(student.config.attention, memory="none")
    alone = load_hf(teacher_path(), attention=window)
    assert loss(teacher) < loss(student) < loss(alone)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("", ("none", "1024tokens", "auto:10%")),
        ("--state-bytes 5MiB --heads=", ("none", "5MiB", "")),
        ("--kept 9", ("none", "", "")),
        ("--memory evicted", ("evicted", "1024tokens", "auto:10%")),
        ("--feature-half 16", (None, "1024tokens", "auto:10%")),
        ("--preset lolcats", (None, "", "")),
        ("--preset lolcats --state-bytes 5MiB", (None, "5MiB", "")),
    ],
)
def test_what_is_not_said_is_the_best_that_is_known_without_training(line, wanted):
    args = convert.untrained(convert.arguments().parse_args(["linearize", "teacher", "student", *line.split()]))
    assert (args.memory, args.state_bytes, args.heads) == wanted


def test_the_command_alone_makes_the_best_student(tmp_path, monkeypatch, capsys):
    """A tenth of the key heads whole for as long as the size pays for, pairs by need, no memory; constant in length."""
    student, line = tmp_path / "student", "--window 16 --sequence-length 128 --state-bytes 48tokens"
    monkeypatch.setattr("sys.argv", ["convert.py", "linearize", str(teacher_path()), str(student), *line.split()])
    assert convert.main() == 0
    printed = capsys.readouterr().out
    attention = load_hf(student).config.attention
    assert attention is not None
    assert (attention.memory, len(attention.softmax_heads)) == ("none", 1)
    assert 16 < attention.retrieval_window < 48 * 12
    assert f"of the key heads 1 exact for {attention.retrieval_window} tokens, " in printed
    assert "at any length" in printed
    assert not (student / "lizard.safetensors").exists()


def test_linearize_refuses_texts_that_never_leave_the_window(tmp_path):
    with pytest.raises(UserError, match="never leave the window of 32"):
        convert.linearize(
            str(teacher_path()), str(tmp_path / "out"), preset="lizard", window=32, data="embedded", length=32
        )
    assert not list(tmp_path.iterdir())


def test_a_window_alone_is_written_and_read_without_new_modules(tmp_path):
    summary = convert.linearize(
        str(teacher_path()), str(tmp_path / "student"), preset="lizard", window=48, data="embedded", length=256,
        memory="none",
    )  # fmt: skip
    assert "share" not in summary
    assert not (tmp_path / "student" / "lizard.safetensors").exists()
    student, teacher = load_hf(tmp_path / "student"), load_hf(teacher_path())
    ids = jnp.arange(40, dtype=jnp.int32)[None]
    chex.assert_trees_all_close(logits(student, ids), logits(teacher, ids), atol=1e-4)
    assert student.config.attention.memory == "none"


@pytest.mark.parametrize(("reach", "kept"), [(0, 0), (64, 20)], ids=["keeps all", "long window and pairs"])
def test_a_student_with_exact_heads_is_written_read_and_goes_on(tmp_path, reach, kept):
    """By a ranking's file: through a directory, a text beyond its first cache, and a conversation's file."""
    ranking, teacher = choice.ranking("retrieval", np.asarray([[0.1, 0.2], [0.0, 0.3]])), shallow(tmp_path / "teacher")
    (tmp_path / "heads.json").write_text(choice.text(ranking))
    summary = convert.linearize(
        str(teacher), str(tmp_path / "split"), preset="lizard", window=16, data="embedded", length=256,
        memory="none", heads=f"{tmp_path / 'heads.json'}:2", retrieval_window=reach, kept=kept,
    )  # fmt: skip
    # Bytes of the fp32 state, by hand: rings and first tokens of 4 key heads, two of them exact, and pairs.
    assert ("at any length" in summary) == bool(reach)
    student = lizard_jax.load(tmp_path / "split")
    token, short, layers = 2 * 32 * 4, 2, 2
    rings = short * (16 + 4) * token + (2 * (reach + 4) * token if reach else 2 * 8192 * token)
    pairs = short * (kept * (token + 8) + (16 * 4 if kept else 0))
    positions = 4 * (layers + 2)
    assert student.state_bytes(8192) == rings + pairs + positions
    assert student.config.attention is not None
    assert student.config.attention.softmax_heads == ("0.1", "1.1")
    assert student.config.attention.kept == kept
    save_flax(student, tmp_path / "flax", source=tmp_path / "split")
    again = lizard_jax.load(tmp_path / "flax")
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (1, 200)), jnp.int32)
    chex.assert_trees_all_equal(logits(again, ids), logits(student, ids))

    tokenizer = load_tokenizer(teacher)
    prompt = [int(token) for token in ids[0, :70]]
    whole = Generation(student, tokenizer, [prompt], max_new_tokens=40, sampling=Sampling())
    list(whole.pieces())
    first = Generation(student, tokenizer, [prompt], max_new_tokens=20, sampling=Sampling())
    list(first.pieces())
    save(tmp_path / "state", first.conversation(), student)
    state = load(tmp_path / "state", student)
    rest = Generation(student, tokenizer, [[]], max_new_tokens=20, sampling=Sampling(), earlier=state)
    list(rest.pieces())
    assert first.rows[0].tokens + rest.rows[0].tokens == whole.rows[0].tokens
