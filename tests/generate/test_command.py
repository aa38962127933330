"""The command line: what is printed where, and what is said of bad input."""

import io
import json
import signal
import subprocess
import sys

import pytest

import lizard_jax
from lizard_jax.embedded import __file__ as embedded
from lizard_jax.generate.__main__ import main

TEACHER = embedded.replace("__init__.py", "teacher")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main([TEACHER, *map(str, arguments)])
    return code, *capsys.readouterr()


def test_prompt_then_continuation_on_stdout(capsys, tmp_path):
    code, out, err = run(capsys, "--prompt", "def main(", "--max-new-tokens", 12, "--save-state", tmp_path / "state")
    assert code == 0
    assert out.startswith("def main(")
    assert "wrote 12" in err
    whole = run(capsys, "--prompt", "def main(", "--max-new-tokens", 20)[1]
    code, rest, _ = run(capsys, "--load-state", tmp_path / "state", "--max-new-tokens", 8)
    assert code == 0
    assert out.removesuffix("\n") + rest == whole

    model = lizard_jax.load(TEACHER)
    assert model.generate("def main(", max_new_tokens=20) == whole.removesuffix("\n").removeprefix("def main(")
    stop = whole[14:16]
    assert model.generate(["def main(", "x"], max_new_tokens=20, stop=[stop])[0] == whole[9:].split(stop)[0]


def test_a_file_of_prompts_is_one_batch(capsys, tmp_path):
    prompts = [{"prompt": "def main(", "id": 7}, {"prompt": "import"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)) + "\n\n")
    code, out, _ = run(capsys, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 9)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line | prompt for line, prompt in zip(lines, prompts, strict=True)] == lines
    alone = run(capsys, "--prompt", "import", "--max-new-tokens", 9)[1]
    assert lines[1]["continuation"] == alone.removesuffix("\n").removeprefix("import")
    assert {line["finish"] for line in lines} <= {"eos", "length"}


def test_a_conversation_line_by_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def one(\n\ndef two(\n"))
    code, out, _ = run(capsys, "--interactive", "--max-new-tokens", 5)
    assert code == 0
    assert out.count("\n") >= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to continue"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--top-p", "7"], "top_p is 7.0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompts", "nowhere.jsonl"], "cannot read prompts from nowhere.jsonl"),
        (["--load-state", "nowhere"], "no saved state at nowhere"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert words in err


def test_bad_records_are_named(capsys, tmp_path):
    for content, words in (("", "holds no prompts"), ("{", ":1 is not JSON"), ('{"text": 1}', ":1 has neither")):
        (tmp_path / "prompts.jsonl").write_text(content)
        code, _, err = run(capsys, "--prompts", tmp_path / "prompts.jsonl")
        assert (code, err.count("\n")) == (2, 1)
        assert words in err


# A test run in the background ignores interrupts, and its children would inherit that.
INTERRUPTIBLE = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('lizard_jax.generate', run_name='__main__', alter_sys=True)"
)


def started(*arguments: str) -> subprocess.Popen:
    """The command by itself, with far more to write than it will get to."""
    command = [sys.executable, "-c", INTERRUPTIBLE, TEACHER, "--max-new-tokens", "4000", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_what_was_written_stands_after_an_interrupt_and_can_be_gone_on_with(capsys, tmp_path):
    with started("--prompt", "def main(", "--save-state", str(tmp_path / "state")) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(len("def main(") + 40)
        process.send_signal(signal.SIGINT)
        first += process.stdout.read()
        err = process.stderr.read().splitlines()
    assert process.returncode == 130, err
    assert first.endswith("\n")
    assert err[0].endswith(f"bytes in {tmp_path / 'state'}")
    assert err[1:] == ["interrupted; what was written stands"]
    code, second, _ = run(capsys, "--load-state", tmp_path / "state", "--max-new-tokens", "20")
    assert code == 0
    _, whole, _ = run(capsys, "--prompt", "def main(", "--max-new-tokens", "1000")
    assert whole.startswith(first.removesuffix("\n") + second.removesuffix("\n"))


def test_a_conversation_outlives_an_interrupted_answer():
    with started("--interactive", "--max-new-tokens", "1500") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("def main(\nimport\n")
        process.stdin.close()
        process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        out = process.stdout.read()
        err = process.stderr.read()
    assert process.returncode == 0, err
    assert err.count("(interrupted)") == 1
    assert len(out) > 1500, "the second answer is whole"


def test_an_output_that_is_closed_ends_in_one_line():
    with started("--prompt", "def main(", "--temperature", "1") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(9) == "def main("
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 2
    assert err == "error: the output was closed before all of it was written\n"
