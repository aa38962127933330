"""``train.py`` from command line to report, on a minute random teacher."""

import dataclasses
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lizard_jax.cli import load_recipe, override
from lizard_jax.config import to_dict
from lizard_jax.convert.files import carry
from lizard_jax.convert.load import load_hf
from lizard_jax.convert.save import save_hf
from lizard_jax.data.loader import Loader
from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import teacher_path
from lizard_jax.errors import UserError
from lizard_jax.models import build
from lizard_jax.nn.params import LoraParam, NewParam
from lizard_jax.select import choice
from lizard_jax.select.budgets import Curves
from lizard_jax.sharding import check_batch
from lizard_jax.train import __main__ as train
from lizard_jax.train.checkpoint import named
from lizard_jax.train.run import fingerprint, load_run, short_text
from lizard_jax.train.settle import begun, continued, with_batch, with_budgets, with_heads
from tests.train.tiny import MODEL, mesh_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "hf"
    shape = dataclasses.replace(MODEL, vocab_size=1024, num_layers=1)
    save_hf(build(shape, rngs=nnx.Rngs(0)), directory, source=None)
    carry(teacher_path(), directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["def", "return", "lizard", "class", "yield", "x"], (60, 80))
    path.write_text("<|endoftext|>".join(" ".join(row) for row in words))
    return path


@pytest.fixture(scope="module")
def line(teacher, text):
    """A command line for a few steps, without stage and out."""
    sizes = "--sequence-length 32 --window 8 --chunk 8 --kept 0 --batch-size 8 --steps 3"
    text_and_rate = ["--data", str(text), "--held-out", "0.1", "--held-out-tokens", "512", "--learning-rate", "1e-2"]
    return [*sizes.split(), "--teacher", str(teacher), *text_and_rate]


@pytest.fixture(scope="module")
def first(tmp_path_factory, line):
    """A finished stage 1 over eight devices."""
    out = tmp_path_factory.mktemp("runs") / "first"
    assert train.main(["--stage=1", *line, "--out", str(out)]) == 0
    return out


def _refused(capsys, argv, told):
    """Code 2 and one line that says what is wrong."""
    try:
        code = train.main(argv)
    except SystemExit as stopped:
        code = stopped.code
    stderr = capsys.readouterr().err
    assert code == 2, stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert told in stderr


def test_heads_of_a_ranking_keep_softmax_through_both_stages(tmp_path, line, teacher, capsys):
    """Named once by a file; a begun run and stage 2 keep their choice, whatever has become of the file."""
    file = tmp_path / "heads.json"
    file.write_text(choice.text(choice.ranking("retrieval", np.asarray([[0.2, 0.8]]))))
    own = [*line, "--kept", "4", "--heads", f"{file}:1", "--out", str(tmp_path / "run")]
    assert train.main(["--stage=1", *own]) == 0
    record = json.loads((tmp_path / "run" / "stage1" / "run.json").read_text())
    assert record["config"]["attention"]["softmax_heads"] == ["0.1"]
    new = named(nnx.state(load_run(tmp_path / "run" / "stage1")[0], NewParam))
    assert new["layers/0/attention/mixer/short/phi_q/kernel"].shape[0] == 2
    start = load_hf(json.loads((tmp_path / "run" / "stage1" / "run.json").read_text())["teacher"]["path"],
                    attention=load_run(tmp_path / "run" / "stage1")[0].config.attention)  # fmt: skip
    fresh = named(nnx.state(start, NewParam))
    assert all(np.abs(np.asarray(new[name] - fresh[name])).max() > 0 for name in new)
    file.unlink()
    config = override(load_recipe("tiny", 1), {"heads": f"{file}:1"})
    earlier = begun(tmp_path / "run" / "stage1")
    assert with_heads(config, frozenset(), earlier, teacher).attention.softmax_heads == ("0.1",)
    assert train.main(["--stage=2", *line, "--kept", "4", "--out", str(tmp_path / "run")]) == 0
    attention = load_run(tmp_path / "run" / "stage2")[0].config.attention
    assert (attention.softmax_heads, attention.kept) == (("0.1",), 4)
    capsys.readouterr()
    _refused(
        capsys,
        ["--stage=2", *line, "--kept", "4", "--heads", "auto:1", "--out", str(tmp_path / "run")],
        "heads='auto:1'",
    )
    other = ["--stage=1", *line, "--heads", "auto:1", "--softmax-heads", "0.0", "--out", str(tmp_path / "other")]
    _refused(capsys, other, "give one of them")
    _refused(capsys, ["--stage=1", *line, "--heads", str(file), "--out", str(tmp_path / "other")], "heads.json")


def test_a_state_of_that_size_is_split_among_heads_through_both_stages(tmp_path, line, teacher, capsys):
    """Measured on the text once; a begun run and stage 2 keep the split."""
    plain = [argument for argument in line if argument not in ("--kept", "0")]
    own = [*plain, "--state-bytes", "16tokens", "--feature-half", "2", "--out", str(tmp_path / "run")]
    assert train.main(["--stage=1", *own]) == 0
    assert "state: 0.0" in capsys.readouterr().err
    first = load_run(tmp_path / "run" / "stage1")[0].config.attention
    assert first.budgets
    assert first.kept == 0
    again = override(load_recipe("tiny", 1), {"state_bytes": "16tokens"})
    earlier = begun(tmp_path / "run" / "stage1")
    assert with_budgets(again, frozenset(), earlier, teacher).attention.budgets == first.budgets
    second = override(load_recipe("tiny", 2), {"out": str(tmp_path / "run")})
    assert continued(second, frozenset()).attention == first
    capsys.readouterr()
    _refused(capsys, ["--stage=1", *own, "--kept", "3"], "--state-bytes says what is kept; leave out --kept")
    other = ["--stage=1", *plain, "--out", str(tmp_path / "other"), "--state-bytes"]
    _refused(capsys, [*other, "10"], "a state of 10 bytes (--state-bytes) is too small")
    _refused(capsys, [*other, "9tokens", "--curves", str(tmp_path / "none.json")], "none.json")
    assert not (tmp_path / "other").exists()


def test_heads_are_chosen_automatically(tmp_path, teacher):
    """The minute teacher's context of 64 tokens holds a needle and its question."""
    config = override(load_recipe("tiny", 1), {"heads": "auto:1", "attention.window": 8, "attention.chunk": 8})
    chosen = with_heads(config, frozenset(), None, teacher, mesh_of(fsdp=8))
    assert chosen.attention.softmax_heads in (("0.0",), ("0.1",))


def test_a_stage_leaves_its_report(first):
    place = first / "stage1"
    result = json.loads((place / "result.json").read_text())
    assert result["after"]["loss"] > 0
    assert {
        "teacher",
        "before",
        "after",
        "config",
        "versions",
        "tokens",
        "seconds",
        "tokens_per_second",
    } <= result.keys()
    assert len(result["after"]["layer_mse"]) == 1
    assert result["tokens"] == 3 * 8 * 32
    assert (place / "curves.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((place / "run.json").read_text())
    assert record["config"]["attention"]["window"] == 8
    assert len(record["teacher"]["fingerprint"]) == 64
    assert not [path.name for path in place.iterdir() if path.name.startswith(".")]


def test_a_finished_run_is_shown_again(first, line, capsys):
    before = (first / "stage1" / "metrics.jsonl").read_text()
    assert train.main(["--stage=1", *line, "--out", str(first)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert (first / "stage1" / "metrics.jsonl").read_text() == before


def test_resuming_with_changed_settings_names_them(first, line, capsys):
    argv = ["--stage=1", *line, "--out", str(first), "--learning-rate", "0.5", "--beta1", "0.8"]
    _refused(capsys, argv, "optim.beta1: 0.9 -> 0.8; optim.learning_rate: 0.01 -> 0.5")


def test_resuming_with_another_teacher_or_other_data_is_refused(first, line, teacher, text, tmp_path, capsys):
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    assert fingerprint(other) == fingerprint(teacher)
    file = other / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    _refused(capsys, ["--stage=1", *line, "--out", str(first), "--teacher", str(other)], "teacher: not the one")
    changed = tmp_path / "text.txt"
    changed.write_text(text.read_text() + "<|endoftext|>one more document")
    _refused(capsys, ["--stage=1", *line, "--out", str(first), "--data", str(changed)], "data: not the one")


def test_stage_2_starts_from_stage_1_and_loads_again(first, line, capsys):
    # Teacher, attention and text are stage 1's without being said again.
    rest = "--sequence-length 32 --batch-size 8 --held-out-tokens 512 --steps 2 --learning-rate 1e-2"
    assert train.main(["--stage=2", "--out", str(first), *rest.split()]) == 0
    results = [json.loads((first / f"stage{stage}" / "result.json").read_text()) for stage in (1, 2)]
    np.testing.assert_allclose(results[1]["before"]["loss"], results[0]["after"]["loss"], rtol=1e-5)
    model, source = load_run(first / "stage2")
    assert (source / "tokenizer.json").exists()
    assert any(
        np.abs(np.asarray(leaf)).max() > 0 for name, leaf in _leaves(model, LoraParam).items() if "lora_b" in name
    )
    one, _ = load_run(first / "stage1")
    moved = _leaves(model, NewParam)
    assert any(
        np.abs(np.asarray(leaf) - np.asarray(moved[name])).max() > 0 for name, leaf in _leaves(one, NewParam).items()
    )
    capsys.readouterr()
    _refused(capsys, ["--stage=2", "--out", str(first), "--window", "16"], "attention.window=16")


def _leaves(model, kind):
    return named(nnx.state(model, kind))


def test_load_run_refuses_a_teacher_that_changed(first, tmp_path):
    place = tmp_path / "stage1"
    shutil.copytree(first / "stage1", place)
    record = json.loads((place / "run.json").read_text())
    record["teacher"]["fingerprint"] = "0" * 64
    (place / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="not the one"):
        load_run(place)
    with pytest.raises(UserError, match=r"run\.json is missing"):
        load_run(tmp_path)


def test_a_run_is_found_from_anywhere_and_its_teacher_where_it_moved(line, teacher, tmp_path, monkeypatch, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    shutil.copytree(teacher, here / "teacher")
    monkeypatch.chdir(here)
    short = [*line, "--teacher", "teacher", "--steps", "1", "--out", "run"]
    assert train.main(["--stage=1", *short]) == 0
    monkeypatch.chdir("/")
    source = load_run(here / "run" / "stage1")[1]
    assert source.samefile(here / "teacher")
    # Both move: the way between them still leads there. Then the teacher alone, and has to be named.
    here.rename(there)
    assert load_run(there / "run" / "stage1")[1].samefile(there / "teacher")
    (there / "teacher").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"was trained with is not at .*; name it with --teacher"):
        load_run(there / "run" / "stage1")
    for command in (
        ["lizard_jax.generate", str(there / "run" / "stage1"), "--prompt", "a", "--max-new-tokens", "2"],
        [
            "lizard_jax.eval",
            "recall",
            str(there / "run" / "stage1"),
            "--pairs",
            "2",
            "--lengths",
            "32",
            "--samples",
            "1",
        ],
        ["lizard_jax.convert", "flax2hf", str(there / "run" / "stage1"), str(tmp_path / "hf")],
    ):
        main = importlib.import_module(f"{command[0]}.__main__").main
        given = [*command[1:], "--teacher", str(tmp_path / "elsewhere")]
        if command[0] == "lizard_jax.convert":
            monkeypatch.setattr("sys.argv", ["convert.py", *given])
            assert main() == 0
        else:
            assert main(given) == 0
    with pytest.raises(UserError, match="is not the one"):
        load_run(there / "run" / "stage1", teacher=teacher_path())
    # Stage 2 goes on from another directory too.
    argv = ["--stage=2", "--out", str(there / "run"), "--sequence-length", "32", "--batch-size", "8", "--steps", "1"]
    capsys.readouterr()
    _refused(capsys, argv, "name it with --teacher")
    assert train.main([*argv, "--held-out-tokens", "256", "--teacher", str(tmp_path / "elsewhere")]) == 0


def test_nothing_scored_is_no_perfect_result(line, tmp_path, capsys):
    file = tmp_path / "chat.jsonl"
    record = {"instruction": "say " + "much " * 200, "input": "", "output": "a"}
    file.write_text("\n".join([json.dumps(record)] * 50))
    argv = ["--stage=1", *line, "--out", str(tmp_path / "out"), "--data", str(file), "--answer-only"]
    _refused(capsys, [*argv, "--held-out-tokens", "64"], "keeps for validation is scored, so nothing could be measured")
    assert not (tmp_path / "out").exists()


def test_a_stage_1_that_was_cut_off_is_told(first, line, tmp_path, capsys):
    shutil.copytree(first / "stage1", tmp_path / "stage1")
    (tmp_path / "stage1" / "result.json").unlink()
    assert train.main(["--stage=2", *line, "--steps", "1", "--out", str(tmp_path)]) == 0
    message = capsys.readouterr().err
    assert f"warning: stage 1 in {tmp_path / 'stage1'} did not come to its end" in message


def test_stage_0_exports_a_teacher(line, tmp_path):
    assert train.main(["--stage=0", *line, "--out", str(tmp_path / "out")]) == 0
    exported = tmp_path / "out" / "stage0" / "hf"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in exported.iterdir()}
    model = load_hf(exported)
    best, _ = load_run(tmp_path / "out" / "stage0")
    for one, other in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(best)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--teacher /nonexistent/teacher", "/nonexistent/teacher"),
        ("--data /nonexistent/text.txt", "/nonexistent/text.txt"),
        ("--data EMPTY", "empty.txt"),
        ("--out FILE/run", "cannot write"),
        ("--out gs://bucket/run", "is no folder"),
        ("--sequence-length 4", "shorter than the window 8"),
        ("--batch-size 6", "batch size 6"),
        ("--mesh-data 3", "mesh"),
        ("--learning-rate 0", "learning rate"),
        ("--config nope", "choose from"),
        ("--preset nope", "choose from"),
        ("--lora-targets nope --stage=2", "stage 1"),
        ("--memory all", "combine"),
        ("--steps many", "--steps"),
    ],
)
def test_bad_input_is_one_line_code_2_and_leaves_nothing(more, told, line, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    more = more.replace("EMPTY", str(tmp_path / "empty.txt")).replace("FILE", str(tmp_path / "empty.txt"))
    _refused(capsys, ["--stage=1", *line, "--out", str(tmp_path / "run"), *more.split()], told)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_the_recipes_batch_follows_the_mesh(tmp_path, capsys):
    config = override(load_recipe("tiny", 1), {"data.batch_size": 3})
    mesh = mesh_of(data=2, fsdp=4)
    assert with_batch(config, frozenset({"data.batch_size"}), None, mesh) is config  # as given, to be refused
    assert begun(tmp_path) is None
    assert with_batch(config, frozenset(), None, mesh).data.batch_size == 8
    assert capsys.readouterr().err == "note: 8 rows a step instead of 3, for 8 devices\n"
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(override(config, {"data.batch_size": 16}))}))
    assert with_batch(config, frozenset(), begun(tmp_path), mesh).data.batch_size == 16


def test_a_batch_that_does_not_come_apart_is_told(capsys):
    mesh, config = mesh_of(data=2, fsdp=2), override(load_recipe("tiny", 1), {"data.accumulate": 3})
    assert with_batch(config, frozenset(), None, mesh).data.batch_size == 12
    assert capsys.readouterr().err == "note: 12 rows a step instead of 8, for 4 devices and 3 parts\n"
    told = (
        r"batch size 8 does not divide over data x fsdp = 4 devices in 3 parts \(--accumulate\); use a multiple of 12"
    )
    with pytest.raises(UserError, match=told):
        check_batch(8, mesh, 3)


def test_a_reach_that_was_not_given_is_what_the_size_pays_for(tmp_path, teacher):
    """Exact heads see less where state or teacher's context are small, and just what was asked for where it was."""
    changes = {"attention.window": 8, "attention.chunk": 8, "attention.feature_half": 2}
    changes |= {"attention.softmax_heads": ("0.1",), "attention.retrieval_window": 100, "state_bytes": "20tokens"}
    changes |= {"curves": str(tmp_path / "curves.json")}
    curves = Curves(window=8, kept=[0, 2, 8], errors=[[[0.3, 0.2, 0.1]] * 2])
    (tmp_path / "curves.json").write_text(curves.model_dump_json())
    config = override(load_recipe("tiny", 1), changes)
    fits = with_budgets(config, frozenset(), None, teacher).attention
    assert 8 < fits.retrieval_window < 32
    wide = with_budgets(override(config, {"state_bytes": "1MiB"}), frozenset(), None, teacher).attention
    assert wide.retrieval_window == 64  # the teacher's context
    with pytest.raises(UserError, match="too small"):
        with_budgets(config, frozenset({"attention.retrieval_window"}), None, teacher)
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(override(config, {"attention": fits}))}))
    assert with_budgets(config, frozenset(), begun(tmp_path), teacher).attention == fits


def test_heads_named_by_hand_take_the_place_of_the_recipes(teacher):
    config = override(load_recipe("llama3_2_1b", 1), {"attention.softmax_heads": ("0.1",)})
    named_by_hand = with_heads(config, frozenset({"attention.softmax_heads"}), None, teacher)
    assert (named_by_hand.heads, named_by_hand.attention.softmax_heads) == ("", ("0.1",))


def test_a_tokenizer_beyond_the_vocabulary_is_refused(line, tmp_path, capsys):
    small = tmp_path / "teacher"
    save_hf(build(dataclasses.replace(MODEL, num_layers=1), rngs=nnx.Rngs(0)), small, source=None)
    carry(teacher_path(), small)
    _refused(capsys, ["--stage=1", *line, "--out", str(tmp_path / "run"), "--teacher", str(small)], "64")
    assert not (tmp_path / "run").exists()


def test_bad_input_in_a_process_of_its_own(line, tmp_path):
    """Nothing that is imported adds a line of its own."""
    argv = [*line, "--out", str(tmp_path / "run"), "--data", str(tmp_path / "absent.txt")]
    done = subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_two_processes_make_the_same_run(line, tmp_path, x64):
    """One device each, through jax.distributed, and one process with eight. In float64: Adam divides a gradient by its
    own size, so where that is small an order of additions in fp32 moves a parameter by any share of a step.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    both = os.environ | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
    own = ["--stage=1", *line, "--dtype=float64", "--out"]
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", *own, str(tmp_path / "two")], cwd=ROOT,
            env=both | {"JAX_PROCESS_ID": str(index)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "perplexity" in told[0][0]
    assert "perplexity" not in told[1][0]
    assert train.main([*own, str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "stage1" / "result.json").read_text()) for name in ("one", "two"))
    np.testing.assert_allclose(two["after"]["loss"], one["after"]["loss"], rtol=1e-9)
    np.testing.assert_allclose(two["after"]["layer_mse"], one["after"]["layer_mse"], rtol=1e-9)
    alone, together = (_leaves(load_run(tmp_path / name / "stage1")[0], NewParam) for name in ("one", "two"))
    for name, leaf in alone.items():
        assert leaf.dtype == np.float64
        np.testing.assert_allclose(together[name], leaf, atol=1e-9, err_msg=name)


def test_a_window_alone_has_no_stage_1_and_starts_with_stage_2(line, tmp_path, capsys):
    argv = [*line, "--memory=none", "--meta=prefix", "--out", str(tmp_path)]
    _refused(capsys, ["--stage=1", *argv], "nothing to train")
    assert not list(tmp_path.iterdir())
    assert train.main(["--stage=2", *argv]) == 0
    model, _ = load_run(tmp_path / "stage2")
    assert not jax.tree.leaves(nnx.state(model, NewParam))
    assert jax.tree.leaves(nnx.state(model, LoraParam))


def test_stage_1_says_what_it_starts_from_and_warns_of_short_documents(line, text, tmp_path, capsys):
    assert train.main(["--stage=1", *line, "--out", str(tmp_path / "a")]) == 0
    message = capsys.readouterr().err
    assert "memory's share" in message
    assert "warning" not in message
    # The documents have some 80 tokens: under a window as long as the sequence nothing is left to remember.
    given = {"attention.window": 32, "data.path": str(text), "data.sequence_length": 32, "data.held_out": 0.1}
    config = override(load_recipe("tiny", 1), given)
    loader = Loader(config.data, load_tokenizer(teacher_path()), vocab_size=1024)
    assert "warning: 0.0% of the positions" in (short_text(config, loader) or "")
