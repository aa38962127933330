"""Tasks for lm-evaluation-harness out of local files, for machines without a hub.

    uv run benchmarks/local_tasks.py --hellaswag hellaswag.txt.bz2 --text wikitext.txt --out runs/tasks
    uv run --extra eval python -m lizard_jax.eval harness CKPT --task-path runs/tasks --tasks hellaswag_local

``hellaswag_local``: HellaSwag as text, six lines a question (context, number of the right ending, four endings), plain
or compressed with bzip2; ``hellaswag_local_2shot`` is the same behind two solved questions. ``text_local``: a text cut
into pages of ``--page`` characters, scored token by token.
"""

from __future__ import annotations

import argparse
import bz2
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError

CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{endings}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
}


def text_of(path: Path) -> str:
    """The file's text.

    Raises:
        UserError: it cannot be read.
    """
    try:
        raw = path.read_bytes()
        return (bz2.decompress(raw) if path.suffix == ".bz2" else raw).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def questions(path: Path) -> list[dict[str, Any]]:
    """HellaSwag's questions.

    Raises:
        UserError: the file is not six lines a question.
    """
    lines = text_of(path).splitlines()
    if not lines or len(lines) % 6:
        raise UserError(f"{path} has {len(lines)} lines; a question takes six: context, number, four endings")
    out = []
    for number, (context, label, *endings) in enumerate(itertools.batched(lines, 6)):
        if label not in ("0", "1", "2", "3"):
            raise UserError(f"{path}, line {6 * number + 2}: {label!r} is no number from 0 to 3")
        out.append({"context": context, "label": int(label), "endings": endings})
    return out


def pages(path: Path, size: int) -> list[dict[str, Any]]:
    """A text in pieces of ``size`` characters."""
    text = text_of(path).strip()
    return [{"text": text[at : at + size]} for at in range(0, len(text), size)]


def write(directory: Path, name: str, rows: list[dict[str, Any]], tasks: dict[str, dict[str, Any]]) -> None:
    """The data, and a file for each task on it."""
    import yaml

    write_atomic(directory / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for task, settings in tasks.items():
        source = {"data_files": {"test": f"{name}.jsonl"}}
        head = {"task": task, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        write_atomic(directory / f"{task}.yaml", yaml.safe_dump(head | settings, sort_keys=False))
        print(f"{task}: {len(rows):,} documents")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="questions of six lines")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text to score")
    parser.add_argument("--page", type=int, default=2000, help="characters of a page (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the tasks are written")
    args = parser.parse_args()
    try:
        if args.hellaswag is None and args.text is None:
            raise UserError("nothing to make tasks of; give --hellaswag FILE, --text FILE or both")
        if args.page < 1:
            raise UserError(f"--page is {args.page}, must be at least 1")
        asked = questions(args.hellaswag) if args.hellaswag else []
        read = pages(args.text, args.page) if args.text else []
        args.out.mkdir(parents=True, exist_ok=True)
        if asked:
            shots = {"fewshot_split": "test", "num_fewshot": 2, "fewshot_config": {"sampler": "first_n"}}
            write(args.out, "hellaswag", asked, {"hellaswag_local": CHOICES, "hellaswag_local_2shot": CHOICES | shots})
        if read:
            write(args.out, "text", read, {"text_local": ROLLING})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
