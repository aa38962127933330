"""``benchmarks/recovery.py`` on the embedded teacher: what it compares, what it keeps, what it refuses."""

import argparse
import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import changes, first_step, recovery, retrieval
from benchmarks.equal_bytes import state_bytes, students
from lizard_jax.cli import load_recipe, parse
from lizard_jax.config import RunConfig
from lizard_jax.convert.files import read_json
from lizard_jax.convert.hf_config import model_config
from lizard_jax.embedded import budgets_path, corpus, teacher_path
from lizard_jax.models import build
from lizard_jax.select.budgets import Curves
from lizard_jax.train import stages
from tests.train import test_stages


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The command on two short texts; returns its exit code."""
    documents = list(corpus.documents("held_out"))
    (tmp_path / "train.txt").write_text("<|endoftext|>".join(documents[:4]))
    (tmp_path / "score.txt").write_text("unread<|endoftext|>" + documents[5])
    # What each head needs is measured once and kept; tests/test_budgets.py measures.
    (tmp_path / "out").mkdir()
    shutil.copy(budgets_path(), tmp_path / "out" / "budgets.json")

    def run(*argv: str) -> int:
        given = ["recovery.py", f"--teacher={teacher_path()}", "--train", str(tmp_path / "train.txt"), "--score",
                 str(tmp_path / "score.txt"), "--window=32", "--extents", "256", "--texts=2", "--length=256",
                 f"--out={tmp_path / 'out'}", f"--table={tmp_path / 'table'}", *argv]  # fmt: skip
        monkeypatch.setattr(sys, "argv", given)
        return recovery.main()

    return run


def test_rows_of_equal_bytes():
    config = model_config(read_json(teacher_path() / "config.json"))
    errors = [[[float(1 + head), 0.5, 0.1, 0.01, 0.0] for head in range(config.kv_heads)]] * config.num_layers
    curves = Curves(window=32, kept=[0, 8, 32, 128, 512], errors=errors)
    rows = students(32, teacher_path(), (), curves)
    assert list(rows) == [
        "lizard", "lizard, a quarter of the features", "lizard, kept pairs", "window and kept pairs", "window",
        "window, equal bytes", "lizard, pairs by head", "window, pairs by head",
    ]  # fmt: skip
    size = {name: state_bytes(teacher_path(), attention, 256) for name, attention in rows.items()}
    assert size.pop("window") < size["lizard"]
    for name, number in size.items():
        # What no step of the menu fits into is left over, of eight heads as of more.
        least = 0.9 if "by head" in name else 0.98
        assert least < number / size["lizard"] < 1.02, name
    assert len(rows["lizard, pairs by head"].budgets) == config.num_layers * config.kv_heads


def test_rows_before_training(call, tmp_path, capsys):
    some = "--rows", "window", "lizard, pairs by head"
    assert call("--whens", "no training", *some) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    rows = table["rows"]
    assert list(rows) == ["teacher", *(f"{name}, no training" for name in some[1:])]
    last = {name: row["scores"]["256"]["losses"][-1] for name, row in rows.items()}
    assert last["teacher"] < last["lizard, pairs by head, no training"] < last["window, no training"]
    # Inside the window all are the teacher.
    first = [row["scores"]["256"]["losses"][0] for name, row in rows.items()]
    assert max(first) - min(first) < 0.1
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "| window, no training |" in (tmp_path / "table.md").read_text()
    # The last document of a plain text is never trained on.
    assert list(corpus.documents("held_out"))[3][:200] not in (tmp_path / "out" / "train.txt").read_text()

    # What lies there is not measured again, and rows of the same settings stay.
    for kept in (tmp_path / "out").rglob("losses.json"):
        numbers = json.loads(kept.read_text())
        kept.write_text(json.dumps({"256": (np.asarray(numbers["256"]) + 1.0).tolist()}))
    capsys.readouterr()
    assert call("--whens", "no training", "--rows", "window") == 0
    again = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert list(again) == list(rows)
    shifted = again["window, no training"]["scores"]["256"]["losses"][-1]
    assert shifted == pytest.approx(last["window, no training"] + 1.0)
    assert again["lizard, pairs by head, no training"] == rows["lizard, pairs by head, no training"]


def test_tasks_beside_the_loss(call, tmp_path, capsys):
    lines = ["def f(x):", "2", "    sing", "    sit", "    return x", "    sleep"]
    (tmp_path / "questions.txt").write_text("\n".join(3 * lines))
    prose = [f"The {word} of many sentences, none of which means much." for word in "abcdefghijkl"]
    (tmp_path / "book.txt").write_text("trained on<|endoftext|>" + " ".join(prose))
    given = ["--whens", "no training", "--rows", "window", f"--hellaswag={tmp_path / 'questions.txt'}",
             f"--book={tmp_path / 'book.txt'}", "--lengths", "400", "--samples=2"]  # fmt: skip
    assert call(*given) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    for row in rows.values():
        found = row["tasks"]
        assert found["hellaswag"]["acc"] in (0.0, 100.0)  # three times the same question
        assert all(0 <= found[task]["400"] <= 100 for task in ("needle", "passkey", "recall"))
    table = (tmp_path / "table.md").read_text()
    assert "| | hellaswag acc | hellaswag acc_norm | needle 400 | passkey 400 | recall 400 |" in table
    # Kept with what it was asked with: the same is not asked again, something else is.
    kept = tmp_path / "out" / "window" / "scores" / "no_training" / "needle.json"
    told = json.loads(kept.read_text())
    assert told["asked"] == {"lengths": [400], "samples": 2}
    kept.write_text(json.dumps(told | {"found": {"400": 12.5}}))
    assert call(*given) == 0
    assert json.loads((tmp_path / "table.json").read_text())["rows"]["window, no training"]["tasks"]["needle"] == {
        "400": 12.5
    }
    assert call("--ask") == 2
    assert "has no chat template to ask through" in capsys.readouterr().err


def test_flags_say_what_differs_from_the_default_recipe():
    attention = dataclasses.replace(load_recipe("tiny", 1).attention, measured_start=False, memory="none")
    assert recovery.flags(attention) == ["--memory=none", "--no-measured-start"]


def test_refusals(call, capsys):
    assert call("--rows", "nope") == 2
    assert "no row nope" in capsys.readouterr().err
    assert call("--extents", "100000000", "--rows", "window") == 2
    assert "has 100000001 tokens" in capsys.readouterr().err


def test_each_change_is_one_that_a_run_takes():
    base = dataclasses.replace(load_recipe("llama3_2_1b", 1).attention, window=32)
    for name, change in changes.CHANGES.items():
        attention = dataclasses.replace(base, **change)
        config, _ = parse(["--stage=1", *recovery.flags(attention)])
        assert config.attention == attention, name
        assert bool(change) == (name not in ("the recipe", changes.ABSOLUTE))


def test_the_plain_error_is_the_mean_square(monkeypatch):
    monkeypatch.setattr("lizard_jax.train.stages.head_power", stages.head_power)
    monkeypatch.setattr("lizard_jax.train.__main__.main", lambda: 0)
    with pytest.raises(SystemExit):
        exec(changes.PLAIN_ERROR, {})  # as ``python -c`` runs it
    batch, model = test_stages.make_batch(), build(test_stages.CONFIG, rngs=nnx.Rngs(3))
    _, metrics = jax.jit(lambda m, b: stages.loss_and_grads(RunConfig(stage=1), m, b))(model, batch)
    np.testing.assert_allclose(metrics["loss"], metrics["layer_mse"].sum() / 2, rtol=1e-5)  # one of three is softmax


def test_a_change_is_told_with_its_last_validation(tmp_path, capsys):
    lines = [{"step": 0, "validation": {"loss": 3.0, "kl": 0.5}}, {"step": 1, "loss": 2.5},
             {"step": 2, "validation": {"loss": 2.0, "kl": 0.25}}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"bytes": {"256": 2**20}, "scores": {"256": {"losses": [3.0, 2.5], "error": 0.125}}}
    rows = {"teacher": row, "one": row | {"held_out": changes.held_out(tmp_path)}}
    changes.write(argparse.Namespace(table=tmp_path / "table", extents=[256]), {"texts": 2}, rows)
    head, _, teacher, one = (tmp_path / "table.md").read_text().splitlines()
    assert head.endswith("| 128–255 | held-out loss | its KL |")
    assert teacher == "| teacher | 1.00 | 3.000 | 2.500 |  |  |"
    assert one == "| one | 1.00 | 3.000 | 2.500 ± 0.125 | 2.000 | 0.250 |"
    assert json.loads((tmp_path / "table.json").read_text()) == {"settings": {"texts": 2}, "rows": rows}


def test_changes_refuse_what_is_not_there(monkeypatch, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some")
    for more, words in (
        (["--rows", "nothing"], "no row nothing"), (["--train", "none.txt"], "no text at none.txt"),
        (["--teacher", "nowhere"], "no checkpoint at nowhere"),
    ):  # fmt: skip
        text = str(tmp_path / "text.txt")
        given = ["changes.py", "--teacher", str(teacher_path()), "--train", text, "--score", text, *more]
        monkeypatch.setattr(sys, "argv", given)
        assert changes.main() == 2
        assert words in capsys.readouterr().err


def test_a_first_step_refuses_in_one_line(monkeypatch, tmp_path, capsys):
    for more, words in (
        (["--layer", "0"], "--layer and --chip belong together"), (["--chip", "v5e"], "--layer and --chip belong"),
        (["--chip", "abacus", "--layer", "0"], "no chip abacus; the chips are"), ([], "run.json"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["first_step.py", str(tmp_path), *more])
        assert first_step.main() == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1


def test_retrieval_of_a_student_beside_its_teacher(monkeypatch, tmp_path, capsys):
    sentences = [f"This is the {word} of many sentences about nothing at all." for word in "abcdefghijkl"]
    (tmp_path / "book.txt").write_text("unread<|endoftext|>" + " ".join(sentences))

    def call(*more: str) -> int:
        given = ["retrieval.py", "--teacher", str(teacher_path()), "--book", str(tmp_path / "book.txt"), "--lengths",
                 "400", "--depths=2", "--samples=1", "--queries=1", f"--table={tmp_path / 'table'}", *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", given)
        return retrieval.main()

    assert call("--students", "nowhere") == 2
    assert "give NAME=DIR" in capsys.readouterr().err
    assert call("--students", f"same={teacher_path()}") == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["rows"]["same"] == table["rows"]["teacher"]
    assert len(table["rows"]["same"]["found"]["400"]["depths"]) == 2
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    # What stands there is not asked again.
    table["rows"]["same"]["found"]["400"]["queries"] = 0.25
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert call("--students", f"same={teacher_path()}") == 0
    assert json.loads((tmp_path / "table.json").read_text()) == table
