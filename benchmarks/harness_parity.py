"""The harness on our model beside the harness's own Hugging Face backend, request for request.

    uv run benchmarks/local_tasks.py --hellaswag hellaswag.txt.bz2 --text wikitext.txt --out runs/tasks
    uv run --group test benchmarks/harness_parity.py DIR --task-path runs/tasks \\
        --tasks hellaswag_local,hellaswag_local_2shot,text_local --limit 500

DIR is a teacher that transformers can run. Both read the same requests of the same tasks in fp32. For each
task: how many loglikelihoods, the largest difference of two, and both sides' scores. Prints a table, writes
``harness_parity.json``, and exits 1 if a loglikelihood differs by more than ``--tolerance`` or a score at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError
from lizard_jax.eval import harness
from lizard_jax.train.report import versions

HERE = Path(__file__).resolve().parent


def answers(lm: Any, tasks: list[str], args: argparse.Namespace) -> tuple[dict[str, list], dict[str, dict], float]:
    """By task, every request's answer (sums of loglikelihoods) and the scores; and the seconds it took."""
    chosen = harness.load_tasks(tasks, task_path=args.task_path)
    began = time.perf_counter()
    results = harness.evaluate(lm, chosen, limit=args.limit, samples=True)
    seconds = time.perf_counter() - began
    found = {
        name: [sample["resps"] for sample in sorted(rows, key=lambda row: row["doc_id"])]
        for name, rows in results["samples"].items()
    }
    scores = {
        name: {
            key.removesuffix(",none"): value
            for key, value in row.items()
            if isinstance(value, float) and "stderr" not in key
        }
        for name, row in results["results"].items()
    }
    return found, scores, seconds


def flat(found: Any) -> np.ndarray:
    """The numbers of nested answers; whether an answer is the likeliest counts as 0 or 1."""
    return np.asarray([float(x) for x in np.ravel(np.asarray(found, object))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="DIR", help="an HF directory of a teacher")
    parser.add_argument("--tasks", required=True, metavar="A,B,…", help="tasks of loglikelihoods")
    parser.add_argument("--task-path", metavar="DIR", help="directory with task files")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N documents a task")
    parser.add_argument("--batch-size", type=int, default=16, help="texts read at once (default %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="nats (default %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "harness_parity.json", help="(default %(default)s)")
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM

        import lizard_jax
        from lizard_jax.eval._lm import LizardLM
        from lizard_jax.generate.prompts import end_tokens, text_tokenizer

        tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
        model = lizard_jax.load(args.checkpoint, dtype="float32")
        tokenizer = text_tokenizer(model.source)
        lm = LizardLM(model, tokenizer, end=end_tokens(model.source, tokenizer), batch_size=args.batch_size)
        ours, our_scores, our_seconds = answers(lm, tasks, args)
        reference: Any = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="float32")
        backend: Any = HFLM  # whose constructor its types do not describe
        other = backend(reference, tokenizer=tokenizer, batch_size=args.batch_size)
        theirs, their_scores, their_seconds = answers(other, tasks, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    for name in ours:
        mine, reference_answers = flat(ours[name]), flat(theirs[name])
        pairs = {key: [our_scores[name][key], value] for key, value in their_scores[name].items()}
        difference = float(np.abs(mine - reference_answers).max())
        rows.append({"task": name, "numbers": len(mine), "largest_difference": difference, "scores": pairs})
    print("| task | numbers | largest difference | scores: ours / theirs |\n|---|---:|---:|---|")
    for row in rows:
        told_scores = ", ".join(f"{key} {a:.6f} / {b:.6f}" for key, (a, b) in row["scores"].items())
        print(f"| {row['task']} | {row['numbers']:,} | {row['largest_difference']:.1e} | {told_scores} |")
    print(f"{our_seconds:.0f} s ours, {their_seconds:.0f} s theirs")
    accuracies_differ = any(
        a != b for row in rows for key, (a, b) in row["scores"].items() if key.startswith(("acc", "exact"))
    )
    result = {
        "tasks": rows, "limit": args.limit, "checkpoint": Path(args.checkpoint).name, "seconds": our_seconds,
        "their_seconds": their_seconds, "versions": versions(),
    }  # fmt: skip
    write_atomic(args.out, json.dumps(result, indent=2) + "\n")
    return int(accuracies_differ or any(row["largest_difference"] > args.tolerance for row in rows))


if __name__ == "__main__":
    sys.exit(main())
