"""Losses against transformers' own, bytes by hand, the same tokens at every length, and bad data in one line."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lizard_jax.config import preset
from lizard_jax.convert.load import load_hf
from lizard_jax.data.text import load_tokenizer
from lizard_jax.eval import perplexity, texts
from lizard_jax.eval.__main__ import main
from tests.data import toy
from tests.models import hf

LENGTH = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama with a tokenizer of characters, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("llama")
    model = hf.make("Llama", directory, vocab_size=toy.VOCAB_SIZE)
    toy.character_tokenizer().save_pretrained(directory)
    return directory, model


def documents(*lengths: int, vocabulary: int = 61) -> list[texts.Tokens]:
    """Random documents; every token is worth three bytes."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
    return [texts.Tokens(row, np.full(len(row), 3), "") for row in ids]


def their_losses(model, ids) -> np.ndarray:
    """transformers' loss of every token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor(ids[None, :-1], dtype=torch.long)).logits[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:], dtype=torch.long), reduction="none").numpy()


@pytest.mark.parametrize("batch", [1, 3])
def test_documents_are_scored_as_transformers_scores_their_contexts(checkpoint, batch):
    directory, theirs = checkpoint
    held = documents(9, 40, 2, 17, 33)
    found = perplexity.measure(load_hf(directory), held, length=LENGTH, tokens=90, batch=batch)
    expected, counted = [], 0
    for document in held:
        ids = document.ids[: 90 - counted + 1]
        counted += len(ids) - 1
        for start in range(0, len(ids) - 1, LENGTH):
            expected += [(i + 1, x) for i, x in enumerate(their_losses(theirs, ids[start : start + LENGTH + 1]))]
    losses = np.array([x for _, x in expected])
    assert found["tokens"] == len(losses) == 90
    assert found["loss"] == pytest.approx(losses.mean(), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / (3 * 90), abs=1e-5)
    assert sum(row["tokens"] for row in found["positions"]) == 90
    for row in found["positions"]:
        inside = [x for seen, x in expected if row["first"] <= seen <= row["last"]]
        assert (row["tokens"], row["loss"]) == (len(inside), pytest.approx(np.mean(inside), abs=1e-5))


@pytest.mark.parametrize("attention", [None, dataclasses.replace(preset("lizard"), window=8, chunk=4)])
def test_every_length_scores_the_same_tokens(checkpoint, attention, monkeypatch):
    model = load_hf(checkpoint[0], attention=attention)
    held = documents(60, 7, 90, 30, 80, 60)
    stream = np.concatenate([document.ids for document in held])
    asked = {}
    measured = perplexity.context_losses

    def spy(model, rows, *, unscored=0, **options):
        asked.setdefault(unscored, []).extend(row[unscored + 1 :] for row in rows)
        return measured(model, rows, unscored=unscored, **options)

    monkeypatch.setattr(perplexity, "context_losses", spy)
    found = perplexity.measure(model, held, length=LENGTH, tokens=1, context_tokens=3 * LENGTH, batch=2)
    monkeypatch.undo()
    main_rows = asked[0][:1]
    asked[0] = asked[0][len(main_rows) :]
    assert sorted(asked) == [(extent - 1) * LENGTH for extent in perplexity.EXTENTS]
    for rows in asked.values():
        np.testing.assert_array_equal(np.concatenate(rows), stream[16 * LENGTH + 1 - LENGTH :][: 3 * LENGTH])
    # In one go, without chunks and state, it is the same number. What stands behind a context does not matter to it.
    whole = jax.jit(lambda model, rows: perplexity.token_losses(model(rows[:, :-1]), rows[:, 1:]))
    for row in found["contexts"]:
        size = row["context"]
        ends = 16 * LENGTH + 1 + LENGTH * np.arange(3)
        windows = np.stack([np.pad(stream[end - size - 1 : end], (0, 16 * LENGTH - size)) for end in ends])
        losses = whole(model, jnp.asarray(windows))[:, size - LENGTH : size]
        assert row["loss"] == pytest.approx(float(losses.mean()), abs=2e-5)
        assert row["tokens"] == 3 * LENGTH
        assert row["error"] == pytest.approx(float(losses.mean(1).std(ddof=1)) / 3**0.5, abs=2e-5)


def test_short_text_leaves_out_the_lengths_it_has_no_room_for(checkpoint, capsys):
    found = perplexity.measure(
        load_hf(checkpoint[0]), documents(40, 30), length=LENGTH, tokens=20, context_tokens=100, batch=2
    )
    assert [row["extent"] for row in found["contexts"]] == [1, 2, 4]
    assert "leave out contexts of 16x" in capsys.readouterr().err
    found = perplexity.measure(load_hf(checkpoint[0]), documents(9), length=LENGTH, tokens=20, context_tokens=100)
    assert found["contexts"] == []


@pytest.mark.parametrize(
    ("text", "ends", "sizes"),
    [
        ("abc", [1, 2, 3], [1, 1, 1]),
        ("aé€🙂", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("€x", [1, 1, 1, 2], [3, 0, 0, 1]),  # a character in three tokens counts once
        (" a b ", [2, 4], [2, 3]),  # what no token stands for is not lost
    ],
)
def test_bytes_of_tokens(text, ends, sizes):
    assert texts.bytes_of(text, ends).tolist() == sizes


def test_bytes_are_those_of_the_file(shared_data, tmp_path):
    text = "Tom said: “Hi!” – a café\nThe end."
    (tmp_path / "text.txt").write_text(f"{text}<|endoftext|>\nAnother one.\n")
    tokenizer = load_tokenizer(shared_data / "babyllama")
    first, second = texts.read(str(tmp_path / "text.txt"), tokenizer, vocab_size=105, separator="<|endoftext|>")
    assert int(first.sizes.sum()) == len(text.encode())
    assert (first.ids[0], first.sizes[0]) == (1, 0)
    assert second.text == "Another one."


def test_the_command_agrees_with_transformers_on_babyllama(shared_data, tmp_path, capsys):
    out = tmp_path / "out"
    directory, data = shared_data / "babyllama", tmp_path / "data.txt"
    stories = (shared_data / "tinystories.txt").read_text()[:3000].split("<|endoftext|>")[:2]
    data.write_text("<|endoftext|>".join(stories))
    arguments = [
        "perplexity",
        str(directory),
        "--data",
        str(data),
        "--out",
        str(out),
        "--context-tokens",
        "0",
        "--batch",
        "4",
    ]
    assert main(arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    tokenizer, theirs = load_tokenizer(directory), transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    losses, sizes = [], 0
    for story in stories:
        ids = np.array([1, *tokenizer(story.strip("\n"), add_special_tokens=False)["input_ids"]])
        sizes += len(story.strip("\n").encode())
        losses += [their_losses(theirs, row) for row in texts.contexts(ids, 256)]
    whole = np.concatenate(losses)
    told = dict(part.split("=") for part in last.split())
    assert list(told) == ["loss", "perplexity", "tokens"]
    assert float(told["loss"]) == pytest.approx(whole.mean(), abs=1e-5)
    assert float(told["perplexity"]) == pytest.approx(math.exp(whole.mean()), rel=1e-4)
    assert int(told["tokens"]) == len(whole)
    written = json.loads((out / "result.json").read_text())
    assert written["bits_per_byte"] == pytest.approx(whole.sum() / math.log(2) / sizes, abs=1e-5)
    assert written["settings"]["batch"] == 4
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("\n \n<|endoftext|>  \n")
    (tmp_path / "file").write_text("")
    (tmp_path / "good.txt").write_text("abc")
    good = str(tmp_path / "good.txt")
    for arguments, words in (
        (["--data", str(tmp_path / "nowhere.txt")], "no data at"),
        (["--data", str(tmp_path / "empty.txt")], "is empty"),
        (["--data", str(tmp_path / "blank.txt")], "nothing to predict"),
        (["--data", good, "--tokens", "0"], "--tokens is 0, must be at least 1"),
        (["--data", good, "--context-tokens", "-1"], "--context-tokens is -1"),
        (["--data", good, "--out", str(tmp_path / "file")], "cannot write results"),
    ):
        assert main(["perplexity", str(checkpoint[0]), *arguments]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert printed.err.startswith("error: ")
        assert words in printed.err
