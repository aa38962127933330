import dataclasses
import json
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from benchmarks import ngram
from lizard_jax.cli import load_recipe
from lizard_jax.config import DataConfig
from lizard_jax.data.loader import Loader
from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import budgets_path, corpus, teacher_config, teacher_path
from lizard_jax.errors import UserError


def test_the_two_splits_share_no_module():
    listed = [name.removesuffix(".__init__") for name in corpus.HELD_OUT_MODULES]
    assert not set(listed) & set(corpus.TRAIN_MODULES)
    assert not {name.split(".")[0] for name in listed} & set(corpus.TRAIN_PACKAGES)
    train, held = corpus.documents("train"), corpus.documents("held_out")
    assert not set(train) & set(held)
    assert sum(map(len, train)) > 5_000_000
    assert sum(map(len, held)) > 400_000


def test_missing_modules_are_tolerated_up_to_a_point(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for name in corpus.HELD_OUT_MODULES[:-1]:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {name}\n")
    assert len(corpus.documents("held_out")) == len(corpus.HELD_OUT_MODULES) - 1
    with pytest.raises(UserError, match=r"carries only 0 of the .* name a text with --data") as error:
        corpus.documents("train")
    assert "\n" not in str(error.value)


def test_the_tokenizer_gives_the_text_back_and_starts_with_bos():
    tokenizer = load_tokenizer(teacher_path())
    assert len(tokenizer) == teacher_config().vocab_size
    for text in [*corpus.documents("held_out"), "tabs\t\r\n  \n\n   trailing  ", "Ünïcødé 漢字 🦎"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_indentation_is_one_token():
    tokenizer = load_tokenizer(teacher_path())
    assert tokenizer.tokenize("\n        return")[0] == "Ċ" + 8 * "Ġ"


def test_training_the_tokenizer_again_gives_the_same(tmp_path):
    subprocess.run([sys.executable, "-m", "lizard_jax.embedded.tokenizer", str(tmp_path / "again")], check=True)
    again = json.loads((tmp_path / "again" / "tokenizer.json").read_text(encoding="utf-8"))
    stored = json.loads((teacher_path() / "tokenizer.json").read_text(encoding="utf-8"))
    # Another patch release has slightly other text, which moves a few of the rarest merges.
    assert len(set(again["model"]["vocab"]) & set(stored["model"]["vocab"])) > 0.95 * 1024
    assert load_tokenizer(tmp_path / "again").bos_token == load_tokenizer(teacher_path()).bos_token


def test_the_tokenizers_command_line_tells_errors(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "lizard_jax.embedded.tokenizer"]
    for arguments in ([], [str(tmp_path / "file" / "below")]):
        done = subprocess.run(command + arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_what_its_heads_need_is_what_a_run_would_measure():
    """To within what another Python's sources change."""
    from lizard_jax.select.budgets import automatic, read

    recipe = load_recipe("tiny", 1)
    kept = read(budgets_path())
    fresh = automatic(teacher_path(), recipe.attention, dataclasses.replace(recipe.data, batch_size=4))
    assert (kept.window, kept.kept) == (fresh.window, fresh.kept)
    assert np.corrcoef(np.log(kept.array[..., 0].ravel()), np.log(fresh.array[..., 0].ravel()))[0, 1] > 0.9


def test_the_embedded_teacher_is_small():
    c = teacher_config()
    attention = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.kv_heads)
    block = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    total = c.vocab_size * c.hidden_size + c.num_layers * block + c.hidden_size
    assert 1_000_000 < total < 2_500_000  # 10 MB in fp32


def test_the_embedded_default_holds_its_modules_out():
    config = DataConfig(sequence_length=256, held_out_tokens=20_000)
    tokenizer = load_tokenizer(teacher_path())
    loader = Loader(config, tokenizer, vocab_size=1024)
    assert loader.num_documents == len(corpus.documents("train"))
    assert loader.num_tokens > 2_000_000
    held = "".join(corpus.documents("held_out"))
    batch = loader.held_out()[0]
    row = batch.inputs[0][batch.segment_ids[0] == 1]
    assert tokenizer.decode(row, skip_special_tokens=True).strip() in held


# ---------------------------------------------------------------------------------------- n-gram baseline


@pytest.fixture(scope="module")
def toy_documents():
    rng = np.random.default_rng(0)
    return [np.concatenate([[0], rng.integers(1, 7, rng.integers(3, 30))]).astype(np.int32) for _ in range(40)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngram_probabilities_sum_to_one(toy_documents, order):
    levels, place = ngram.count(toy_documents, 7, order)
    model = ngram.fit(levels, place, 7)
    histories = np.repeat(np.random.default_rng(1).integers(0, 7, (50, 5)), 7, axis=0)
    rows = np.concatenate([histories, np.tile(np.arange(7), 50)[:, None]], axis=1)
    p = np.exp(ngram.score(model, rows, np.ones_like(rows), 7))[:, -1].reshape(50, 7)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-12)
    assert (p > 0).all()


def test_a_bigram_is_the_formula_by_hand():
    # Four documents, each BOS 1 2 or BOS 1 3: p(2|1) from counts c(12)=3, c(13)=1.
    documents = [np.array(d, np.int32) for d in ([0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 3])]
    levels, place = ngram.count(documents, 4, 2)
    model = ngram.fit(levels, place, 4)
    rows = np.array([[1, 2]])
    # Counts of counts, none below one: n1=1 (13), n2=0->1, n3=1 (12), n4=1 (01). Y=1/3, D1=1/3, D3=3-4/3=5/3.
    d1, d3 = 1 / 3, 5 / 3
    # Below, each of 1, 2, 3 follows one kind of token: n1=3, n2..n4=0->1. Y=3/5, D1=1-2*(3/5)/3=3/5.
    unigram = (1 - 3 / 5) / 3 + 3 / 5 * (1 / 4)
    expected = (3 - d3) / 4 + (d1 + d3) / 4 * unigram
    np.testing.assert_allclose(np.exp(ngram.score(model, rows, np.ones_like(rows), 4))[0, 1], expected, rtol=1e-12)


def test_ngram_context_stops_at_segment_borders(toy_documents):
    levels, place = ngram.count(toy_documents, 7, 3)
    model = ngram.fit(levels, place, 7)
    rows = np.array([[1, 2, 3, 4]])
    cut = ngram.score(model, rows, np.array([[1, 1, 2, 2]]), 7)
    alone = ngram.score(model, rows[:, 2:], np.array([[1, 1]]), 7)
    np.testing.assert_array_equal(cut[:, 2:], alone)
