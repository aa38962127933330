"""What ``recovery.py`` asks of a student beside its loss."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lizard_jax.atomic import write_atomic
from lizard_jax.data.haystack import Measure, sentences
from lizard_jax.data.passkey import PasskeySet
from lizard_jax.data.text import affixes, load_tokenizer
from lizard_jax.eval import passkey, recall, retrieval
from lizard_jax.generate.prompts import end_tokens
from lizard_jax.models import Llama

ASKED = (
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.",
    "Give me three tips for learning to cook.",
    "My name is Olga and I have two dogs, Rex and Fido. Greet me and ask about my dogs by name.",
)
QUERIES = 4
"""Pairs of random tokens in a text of the recall."""


def hellaswag(args: argparse.Namespace, model: Llama, tokenizer: Any) -> dict[str, float]:
    """Accuracy by the likelihood of an ending, and by the same per character, in percent."""
    from benchmarks.local_tasks import CHOICES, questions
    from benchmarks.local_tasks import write as write_tasks
    from lizard_jax.eval import harness
    from lizard_jax.eval._lm import LizardLM

    directory = args.out / "tasks"
    directory.mkdir(exist_ok=True)
    write_tasks(directory, "hellaswag", questions(args.hellaswag), {"hellaswag_local": CHOICES})
    chosen = harness.load_tasks(["hellaswag_local"], task_path=str(directory))
    found = harness.evaluate(LizardLM(model, tokenizer, batch_size=16), chosen, limit=args.questions)
    scores = found["results"]["hellaswag_local"]
    return {name: 100 * scores[f"{name},none"] for name in ("acc", "acc_norm")}


def book(args: argparse.Namespace) -> str:
    """The last document of ``--book``."""
    return args.book.read_text(encoding="utf-8").split("<|endoftext|>")[-1]


def passkeys(args: argparse.Namespace, model: Llama, tokenizer: Any, keys: int) -> dict[str, float]:
    """By length, the percentage of passkeys told right, one depth after the other."""
    ruler = Measure(tokenizer, sentences(book(args)))
    # A lone passkey is asked for as a sentence to end: a small model that chats may say much before it.
    form = "chat" if tokenizer.chat_template and keys > 1 else "plain"
    sets = [PasskeySet(ruler, length, keys, (5, 5), form, depths=args.samples) for length in args.lengths]
    result = passkey.measure(model, sets, samples=1, batch=1, eos=end_tokens(str(args.teacher), tokenizer))
    by_length: dict[int, list[float]] = {}
    for cell in result["cells"]:
        by_length.setdefault(cell["length"], []).append(100 * cell["accuracy"])
    return {str(length): float(np.mean(values)) for length, values in by_length.items()}


def recalled(args: argparse.Namespace, model: Llama, tokenizer: Any) -> dict[str, float]:
    """By length, the percentage of values that are the likeliest of those in the text."""
    result = recall.measure(
        model, affixes(tokenizer)[0], recall.ordinary(tokenizer), lengths=args.lengths, pairs=[QUERIES],
        samples=args.samples, batch=1,
    )  # fmt: skip
    return {str(cell["length"]): 100 * cell["among_values"] for cell in result["cells"]}


def answers(args: argparse.Namespace, model: Llama, tokenizer: Any) -> dict[str, str]:
    """By question, the greedy answer."""
    out = {}
    for question in ASKED:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        out[question] = retrieval.continuations(
            model, tokenizer, [ids], [120], eos=end_tokens(str(args.teacher), tokenizer), batch=1
        )[0]
    return out


def tasks(args: argparse.Namespace) -> dict[str, Callable[[Llama, Any], dict[str, Any]]]:
    """By name, what was asked for beside the loss, as ``task(model, tokenizer)``."""
    out: dict[str, Callable[[Llama, Any], dict[str, Any]]] = {}
    if args.hellaswag:
        out["hellaswag"] = lambda model, tokenizer: hellaswag(args, model, tokenizer)
    if args.book:
        out["needle"] = lambda model, tokenizer: passkeys(args, model, tokenizer, 1)
        out["passkey"] = lambda model, tokenizer: passkeys(args, model, tokenizer, 5)
        out["recall"] = lambda model, tokenizer: recalled(args, model, tokenizer)
    if args.ask:
        out["answers"] = lambda model, tokenizer: answers(args, model, tokenizer)
    return out


def done(args: argparse.Namespace, ready: Callable[[], Llama], where: Path) -> dict[str, dict[str, Any]]:
    """What each task found, kept beside the losses with what it was asked with."""
    found = {}
    for name, task in tasks(args).items():
        kept = where / f"{name}.json"
        asked = {
            "hellaswag": {"questions": args.questions},
            "answers": {"asked": list(ASKED)},
        }.get(name, {"lengths": args.lengths, "samples": args.samples})  # fmt: skip
        old = json.loads(kept.read_text()) if kept.is_file() else {}
        if old.get("asked") != asked:
            old = {"asked": asked, "found": task(ready(), load_tokenizer(args.teacher))}
            where.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, json.dumps(old) + "\n")
        found[name] = old["found"]
    return found
