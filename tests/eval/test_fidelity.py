"""A teacher against itself; a student against it as stage 1 and transformers score them; pictures and text."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lizard_jax
from lizard_jax.config import RunConfig, preset
from lizard_jax.convert.flax_dir import save_flax
from lizard_jax.convert.load import load_hf
from lizard_jax.data.loader import Batch
from lizard_jax.eval import fidelity, texts
from lizard_jax.eval.__main__ import main
from lizard_jax.train import stages
from tests.data import toy
from tests.models import hf

LENGTH = 16
ATTENTION = dataclasses.replace(preset("lizard"), window=4, chunk=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama with a tokenizer of characters, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("llama")
    model = hf.make("Llama", directory, vocab_size=toy.VOCAB_SIZE)
    toy.character_tokenizer().save_pretrained(directory)
    return directory, model


@pytest.fixture(scope="module")
def linear(checkpoint, tmp_path_factory):
    """An untrained student of it."""
    directory = tmp_path_factory.mktemp("student") / "flax"
    save_flax(load_hf(checkpoint[0], attention=ATTENTION), directory, source=checkpoint[0])
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "held_out.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.<|endoftext|>\nOnce more, [bold] of course.\n")
    return file


def documents(*lengths: int):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 61, length).astype(np.int32) for length in lengths]


def test_a_teacher_against_itself(checkpoint):
    teacher = load_hf(checkpoint[0])
    found = fidelity.measure(teacher, teacher, documents(40, 9), length=LENGTH, batch=2)
    assert (found["kl"], found["agreement"], found["tokens"]) == (pytest.approx(0, abs=1e-9), 1.0, 39 + 8)
    assert [row["relative_error"] for row in found["layers"]] == pytest.approx([0, 0], abs=1e-6)
    assert [row["mse"] for row in found["layers"]] == pytest.approx([0, 0], abs=1e-10)
    for theirs, ours in fidelity.attention_maps(teacher, teacher, documents(12)[0]):
        told = fidelity.shares(theirs, ours)
        assert told == pytest.approx({"map_distance": 0, "window_share": 1, "gated_share": 0, "meta_share": 0})


def test_a_student_is_scored_as_stage_1_scores_it(checkpoint):
    teacher, student = load_hf(checkpoint[0]), load_hf(checkpoint[0], attention=ATTENTION)
    rows = documents(LENGTH + 1, 11, LENGTH + 1)
    found = fidelity.measure(student, teacher, rows, length=LENGTH, batch=2)
    inputs, targets, segments = (np.zeros((3, LENGTH), np.int32) for _ in range(3))
    for n, row in enumerate(rows):
        inputs[n, : len(row) - 1], targets[n, : len(row) - 1], segments[n, : len(row) - 1] = row[:-1], row[1:], 1
    batch = Batch(inputs, targets, segments, segments.astype(np.float32))
    told = stages.finish(jax.jit(lambda m, b: stages.evaluate(RunConfig(), m, b))(student, batch))
    assert [row["mse"] for row in found["layers"]] == pytest.approx(told["layer_mse"], rel=1e-4)
    assert found["student_loss"] == pytest.approx(told["loss"], abs=1e-5)
    assert found["teacher_loss"] == pytest.approx(told["teacher_loss"], abs=1e-5)
    assert all(0 < row["relative_error"] < 2 for row in found["layers"])


def test_predictions_are_compared_as_by_hand(checkpoint):
    """KL and agreement against float64 numpy, the teacher's side from transformers."""
    directory, theirs = checkpoint
    teacher, student = load_hf(directory), load_hf(directory, attention=ATTENTION)
    ids = documents(LENGTH + 1)[0]
    found = fidelity.measure(student, teacher, [ids], length=LENGTH, batch=2)
    logits = np.asarray(jax.jit(lambda m, t: m(t))(student, jnp.asarray(ids[None, :-1])), np.float64)[0]
    expected = np.asarray(hf.logits(theirs, ids[None, :-1]), np.float64)[0]
    p, q = (torch.log_softmax(torch.tensor(x), -1).numpy() for x in (expected, logits))
    assert found["kl"] == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert found["agreement"] == (expected.argmax(-1) == logits.argmax(-1)).mean()


def test_rows_of_the_maps_sum_to_one(checkpoint):
    sinks = dataclasses.replace(ATTENTION, meta="sink")
    teacher, student = load_hf(checkpoint[0]), load_hf(checkpoint[0], attention=sinks)
    maps = fidelity.attention_maps(student, teacher, documents(20)[0])
    assert len(maps) == 2
    for theirs, ours in maps:
        assert ours.meta.min() > 0
        np.testing.assert_allclose(theirs.total.sum(-1), 1.0, atol=1e-12)
        np.testing.assert_allclose(ours.total.sum(-1) + ours.meta, 1.0, atol=1e-12)
        told = fidelity.shares(theirs, ours)
        assert told["window_share"] + told["gated_share"] + told["meta_share"] == pytest.approx(1)
        assert 0 < told["map_distance"] < 1


def test_the_command_leaves_pictures_generations_and_numbers(checkpoint, linear, text, tmp_path, capsys):
    (tmp_path / "scored.txt").write_text("A text to measure on, not to show.")
    arguments = ["fidelity", str(linear), "--teacher", str(checkpoint[0]), "--length", "16", "--batch", "2"]
    arguments += ["--data", str(tmp_path / "scored.txt"), "--show", str(text)]
    arguments += ["--prompt-tokens", "5", "--max-new-tokens", "6", "--heads", "2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "top-1 agreement" in printed.splitlines()[-1]
    names = {"result.json", "layers.png", "attention_layer0.png", "attention_layer1.png", "generations.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    # The toy tokenizer decodes with a space between any two characters.
    alone = lizard_jax.load(checkpoint[0])
    for row, prompt in zip(result["generations"], ("The ", "Once"), strict=True):
        assert row["prompt"] == " ".join(prompt)
        assert row["teacher"].strip() == alone.generate(prompt, max_new_tokens=6).strip()
        assert 0 <= row["same"] <= 6
        assert row["same"] < 6 or row["teacher"] == row["student"]
    page = (tmp_path / "out" / "generations.md").read_text()
    assert all(row["student"] in page for row in result["generations"])
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(checkpoint, linear, text, tmp_path, capsys):
    hf.make("Llama", tmp_path / "other", num_hidden_layers=1, vocab_size=toy.VOCAB_SIZE)
    capsys.readouterr()  # transformers' own bar
    for arguments, words in (
        (["--teacher", str(checkpoint[0]), "--layers", "0,x"], "give numbers of layers"),
        (["--teacher", str(checkpoint[0]), "--layers", "2"], "names layer 2, but the student has 2"),
        (["--teacher", str(checkpoint[0]), "--map-tokens", "1"], "--map-tokens is 1, must be at least 2"),
        (["--teacher", str(tmp_path / "nowhere")], "does not exist"),
        (["--teacher", str(tmp_path / "other")], "num_layers=2 and the teacher 1"),
        (["--teacher", str(checkpoint[0]), "--data", str(tmp_path / "none.txt")], "no data at"),
    ):
        assert main(["fidelity", str(linear), "--data", str(text), *arguments]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert printed.err.startswith("error: ")
        assert words in printed.err


def test_the_drawn_text():
    rows = documents(5, 30, 12)
    assert fidelity.map_text(rows, 10).tolist() == rows[1][:10].tolist()
    assert fidelity.map_text(rows, 99).tolist() == rows[1].tolist()
    assert [len(row) for row in texts.contexts(rows[1], 16)] == [17, 14]
