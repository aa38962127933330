"""The harness adapter: the same answers as the harness's own backend, and as reading every text whole."""

import argparse
import bz2
import itertools
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from lizard_jax.config import preset
from lizard_jax.convert.load import load_hf
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from lizard_jax.eval import __main__ as command
from lizard_jax.eval import harness
from lizard_jax.eval._scoring import SHARED, Scorer, families
from tests.models import hf

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{endings}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
TASKS = {
    "endings": CHOICES,
    "endings_fewshot": {**CHOICES, "fewshot_split": "test", "num_fewshot": 1, "fewshot_config": {"sampler": "first_n"}},
    "letters": {**CHOICES, "doc_to_text": "{{context[:60]}}\nAnswer:", "doc_to_choice": ["A", "B", "C", "D"]},
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "stories": {
        "output_type": "generate_until",
        "doc_to_text": "{{context[:40]}}",
        "doc_to_target": "{{endings[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
"""By name: choices that share a context, contexts that share an example, choices of one token, texts, and writing."""


@pytest.fixture(scope="module")
def tasks(shared_data, tmp_path_factory) -> Path:
    """A directory of task files with data beside them."""
    place = tmp_path_factory.mktemp("tasks")
    with bz2.open(shared_data / "eval" / "hellaswag_val_full.txt.bz2", "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in itertools.islice(file, 6 * 4)]
    records = [
        {"context": context, "label": int(label), "endings": endings}
        for context, label, *endings in itertools.batched(lines, 6)
    ]
    text = (shared_data / "eval" / "wikitext2_valid.txt").read_text(encoding="utf-8")
    pages = [{"text": text[at : at + size]} for at, size in ((2, 300), (5000, 40))]
    for name, rows in (("choices", records), ("pages", pages)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = "pages.jsonl" if name == "pages" else "choices.jsonl"
        source = {"data_files": {"test": data}, "cache_dir": str(place / "cache")}
        (place / f"{name}.yaml").write_text(
            yaml.safe_dump(
                {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **task}
            )
        )
    return place


def answers(lm, tasks: Path) -> tuple[dict, dict]:
    """Every request's answer and every metric, by task."""
    chosen = harness.load_tasks(list(TASKS), task_path=str(tasks))
    results = harness.evaluate(lm, chosen, samples=True)
    told = {
        name: [(sample["arguments"], sample["resps"]) for sample in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in results["samples"].items()
    }
    return told, results["results"]


def test_every_request_agrees_with_the_harness_own_backend(tasks, shared_data):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from lizard_jax.eval._lm import LizardLM

    path = shared_data / "babyllama"
    tokenizer = load_tokenizer(path)
    ours, our_metrics = answers(LizardLM(load_hf(path), tokenizer, end=(2,), batch_size=8), tasks)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    theirs, their_metrics = answers(HFLM(reference, tokenizer=tokenizer, batch_size=8), tasks)

    assert set(ours) == set(TASKS)
    compared = 0
    for name in TASKS:
        assert [a for a, _ in ours[name]] == [a for a, _ in theirs[name]]
        if name == "stories":
            assert [r for _, r in ours[name]] == [r for _, r in theirs[name]]
            continue
        for (_, mine), (_, other) in zip(ours[name], theirs[name], strict=True):
            for a, b in zip(np.ravel(np.asarray(mine, object)), np.ravel(np.asarray(other, object)), strict=True):
                assert abs(float(a) - float(b)) < 1e-3, name
                compared += 1
    assert compared == 2 * 3 * 16 + 2
    for name, scores in their_metrics.items():
        for key, value in scores.items():
            if isinstance(value, float):
                assert our_metrics[name][key] == pytest.approx(value, abs=1e-3), (name, key)
        assert our_metrics[name].get("acc,none") == scores.get("acc,none")


@pytest.mark.parametrize("attention", [None, replace(preset("lizard"), window=8, chunk=4)], ids=["teacher", "student"])
def test_what_is_shared_is_read_once_and_changes_nothing(attention, tmp_path):
    """Against one reading of each whole text; the counted tokens say that heads and contexts were not read twice."""
    hf.make("Llama", tmp_path / "model", num_hidden_layers=1)
    model = load_hf(tmp_path / "model", attention=attention)
    draws = np.random.default_rng(0)

    def text(count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in draws.integers(3, model.config.vocab_size, count))

    head, tail, alone = text(40), text(9), text(7)
    requests = [
        *[(head + tail, text(n)) for n in (1, 5, 12)], (head + text(3), text(2)), (head, text(4)),
        (alone, text(1)), (alone, text(3)), (text(50), text(14)),
    ]  # fmt: skip
    requests.append(requests[1])
    scorer, told = Scorer(model, batch=3, max_length=60), []
    answers = scorer.score(requests, advance=told.append)
    assert sum(told) == len(requests)
    assert answers[1] == answers[-1]

    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)[0]))
    for (context, continuation), (score, greedy) in zip(requests, answers, strict=True):
        whole = (*context, *continuation)[-61:]
        # What comes after changes nothing before it, and one length compiles once.
        padded = jnp.zeros((1, 61), jnp.int32).at[0, : len(whole)].set(jnp.asarray(whole, jnp.int32))
        logits = np.asarray(forward(padded))[: len(whole) - 1][-len(continuation) :]
        assert score == pytest.approx(sum(logits[i, t] for i, t in enumerate(continuation)), abs=1e-3)
        assert greedy == bool((np.argmax(logits, axis=1) == np.asarray(continuation)).all())
    heads = 39 + (1 + 9) + (1 + 3) + 1
    assert scorer.tokens_read == heads + (4 + 11) + 1 + 3 + 7 + 2 + 47 + 13

    padded = jnp.zeros((1, 61), jnp.int32).at[0, : len(alone)].set(jnp.asarray(alone, jnp.int32))
    greedy = int(np.argmax(forward(padded)[len(alone) - 1]))
    assert scorer.score([(alone, (greedy,))])[0][1]
    for bad in ([((), (5,))], [((5,), ())], [((5,), text(61))]):
        with pytest.raises(UserError, match="request 1"):
            scorer.score(bad)


def test_families_are_texts_that_begin_alike():
    head = tuple(range(SHARED))
    assert families([(*head, 1, 2), (*head, 1, 3), (9,), (8, 7)]) == [
        (SHARED + 1, [(*head, 1, 2), (*head, 1, 3)]), (0, [(8, 7), (9,)]),
    ]  # fmt: skip
    assert families([head, (*head, 1)]) == [(0, [head, (*head, 1)])]
    assert families([(*head, 0), (*head, 0, 1)]) == [(SHARED, [(*head, 0), (*head, 0, 1)])]
    assert families([]) == []


def test_the_command(tasks, shared_data, tmp_path, capsys):
    told = ["harness", str(shared_data / "babyllama"), "--task-path", str(tasks), "--limit", "2"]
    code = command.main([*told, "--tasks", "letters,pag*", "--num-fewshot", "1", "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert code == 0
    assert "|letters|" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("letters acc=")
    assert "; pages bits_per_byte=" in last
    assert "requests=10 seconds=" in last
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(record["results"]) == {"letters", "pages"}
    assert record["n-shot"] == {"letters": 1, "pages": 1}
    assert record["n-samples"]["letters"]["effective"] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--tasks", "leters"], "unknown task leters; near it: letters"),
        (["--tasks", "letters,lost"], "task lost cannot be loaded: .*nowhere.json"),
        (["--tasks", "strange"], "task strange cannot be loaded: 'nothing' is undefined"),
        (["--tasks", ","], "no task named"),
        (["--tasks", "letters", "--task-path", "nowhere"], "no task files at nowhere"),
        (["--tasks", "letters", "--batch-size", "0"], "--batch-size is 0, must be above 0"),
        (["--tasks", "letters", "--limit", "-1"], "--limit is -1, must be above 0"),
        (["--tasks", "letters", "--num-fewshot", "-1"], "--num-fewshot is -1, must be 0 or more"),
        (["--tasks", "pages", "--max-length", "8", "--tasks", "stories"], "12 new tokens, and the model reads 8"),
    ],
)
def test_bad_input_is_one_line(change, words, tmp_path, shared_data, tasks, capsys, monkeypatch):
    for file in tasks.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    pages = yaml.safe_load((tasks / "pages.yaml").read_text())
    for name, differs in (
        ("lost", {"dataset_kwargs": {"data_files": {"test": "nowhere.json"}}}),
        ("strange", {"doc_to_target": "{{nothing}}"}),
    ):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**pages, "task": name, **differs}))
    # The harness's own tasks take seconds to find.
    import lm_eval.tasks

    local = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **told: local(**{**told, "include_defaults": False}))
    argv = ["harness", str(shared_data / "babyllama"), "--task-path", str(tmp_path), *change]
    assert command.main(argv) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert err.rstrip().endswith(lines[0])
    with pytest.raises(UserError, match=words):
        harness.run(_parsed(argv))


def test_mmlu_has_five_examples_by_name(tasks, tmp_path):
    letters = yaml.safe_load((tasks / "letters.yaml").read_text())
    letters["dataset_kwargs"]["data_files"]["test"] = str(tasks / "choices.jsonl")
    for name, more in (("mmlu_ours", {}), ("plain", {}), ("none", {"num_fewshot": 0}), ("two", {"num_fewshot": 2})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**letters, "task": name, **more}))

    def shots(**told) -> dict[str, int]:
        chosen = harness.load_tasks(["*"], task_path=str(tmp_path), **told)
        return {name: task.get_config("num_fewshot") for name, task in chosen["tasks"].items()}

    assert shots() == {"mmlu_ours": 5, "plain": 0, "none": 0, "two": 2}
    assert shots(num_fewshot=3) == {"mmlu_ours": 3, "plain": 3, "none": 0, "two": 3}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["plain", "two"]}))
    with pytest.raises(UserError, match="asked for twice"):
        harness.load_tasks(["both", "plain"], task_path=str(tmp_path))


def _parsed(argv: list[str]) -> argparse.Namespace:
    return command.arguments(command.evaluations()).parse_args(argv)
