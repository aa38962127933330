"""The command ``lizard``: each word leads to its command, which then calls itself so."""

import sys

import pytest

from lizard_jax import __main__ as lizard


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
    told = capsys.readouterr().out
    assert all(f"\n  {name}" in told for name in lizard.COMMANDS)


def test_errors(monkeypatch, capsys):
    assert call(monkeypatch, "trian") == 2
    assert capsys.readouterr().err == "error: no command trian; choose from train, convert, generate, eval\n"
    with pytest.raises(SystemExit):
        call(monkeypatch, "train", "--widow=3")
    assert capsys.readouterr().err == "error: unrecognized arguments: --widow=3; see lizard train --help\n"
    assert call(monkeypatch, "convert", "hf2flax", "/nowhere", "/nor/here") == 2
    assert capsys.readouterr().err.startswith("error: ")
