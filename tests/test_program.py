"""The command ``lizard``: each word leads to its command, which then calls itself so."""

import gc
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lizard_jax import __main__ as lizard
from lizard_jax.errors import UserError
from lizard_jax.program import ended
from tests.scripted import scripted


def call(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["lizard", *argv])
    return lizard.main()


@pytest.mark.parametrize("name", lizard.COMMANDS)
def test_help_of_a_command(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, name, "--help")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lizard {name} ")


@pytest.mark.parametrize("argv", [(), ("--help",)])
def test_help(argv, monkeypatch, capsys):
    assert call(monkeypatch, *argv) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name}" in printed for name in lizard.COMMANDS)


def test_a_run_loads_no_torch():
    """It takes seconds, and commands start often."""
    code = """
import sys
import lizard_jax.train.__main__
from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import teacher_path
load_tokenizer(teacher_path())
assert "torch" not in sys.modules
import torch
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_errors(monkeypatch, capsys):
    assert call(monkeypatch, "trian") == 2
    assert capsys.readouterr().err == "error: no command trian; choose from train, convert, generate, select, eval\n"
    with pytest.raises(SystemExit):
        call(monkeypatch, "train", "--widow=3")
    assert capsys.readouterr().err == "error: unrecognized arguments: --widow=3; see lizard train --help\n"
    assert call(monkeypatch, "convert", "hf2flax", "/nowhere", "/nor/here") == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("raised", "line", "code"),
    [
        (UserError("a\nb"), "error: a b", 2),
        (BrokenPipeError(32, "Broken pipe"), "error: the output was closed before all of it was written", 2),
        (OSError(28, "No space left on device"), "error: the output cannot be written: No space left on device", 2),
        (PermissionError(13, "Permission denied", "out.txt"), "error: out.txt: Permission denied", 2),
        (KeyboardInterrupt(), "stopped in between", 130),
    ],
)  # fmt: skip
def test_however_a_command_ends_it_says_one_line(raised, line, code, capsys):
    def work():
        raise raised

    assert ended(work, interrupted="stopped in between") == code
    assert capsys.readouterr().err == line + "\n"


def test_an_interrupt_of_a_module_that_is_being_loaded_is_one_and_another_failure_is_none(capsys):
    """Modules written in C++ turn it into an error of their own."""

    def fails(reason):
        raise ImportError("initialization failed") from reason

    assert ended(lambda: fails(KeyboardInterrupt()), interrupted="stopped in between") == 130
    assert capsys.readouterr().err == "stopped in between\n"
    with pytest.raises(ImportError, match="initialization failed"):
        ended(lambda: fails(ValueError("a symbol is missing")), interrupted="stopped in between")


def test_an_interrupt_that_garbage_collection_swallows_comes_again(capsys):
    """Nothing that its callbacks raise gets out of them, and JAX has one."""
    met = []

    def callback(phase, info):
        if not met:
            met.append(phase)
            signal.raise_signal(signal.SIGINT)

    def work():
        gc.collect()
        time.sleep(30)
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.callbacks.append(callback)
    try:
        code = ended(work, interrupted="stopped in between")
    finally:
        gc.callbacks.remove(callback)
        signal.signal(signal.SIGINT, before)
    assert (met, code, capsys.readouterr().err) == (["start"], 130, "stopped in between\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "line", ["convert linearize {teacher} {out} --state-bytes=", "generate {teacher} --prompt a --max-new-tokens 3"]
)
def test_an_output_that_is_full_is_one_line(line, tmp_path):
    words = line.format(teacher=scripted(tmp_path / "model"), out=tmp_path / "out").split()
    command = [sys.executable, "-m", "lizard_jax", *words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: the output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_an_interrupt_while_a_command_loads_is_one_line(tmp_path):
    """Whenever it comes: sent at several moments of a command that takes seconds to load."""
    command = [sys.executable, "-m", "lizard_jax.eval", "perplexity", str(scripted(tmp_path / "model")), "--data", "-"]
    for wait in (1.0, 2.0):
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            time.sleep(wait)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        if process.returncode != 2:  # else it had ended already, for there is no text at "-"
            assert (process.returncode, err) == (130, "interrupted; no result was written\n")
