"""Every evaluation of a teacher and of its student, one after the other, and one page of tables.

    uv run --extra eval benchmarks/evaluate.py --teacher DIR --student DIR --data text.txt --held-out --out results/mine

Runs ``python -m lizard_jax.eval`` for perplexity, passkey, recall, ruler, (with ``--task-path``) the harness and
fidelity, each into a folder of its own below ``--out``, and writes ``README.md`` there: the numbers of both side by
side, the pictures, and the commands. What is already there is kept, so that a run that was cut off goes on;
``--again`` measures anew.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError

Steps = dict[str, list[str]]


def steps(args: argparse.Namespace) -> Steps:
    """By folder, the command of each evaluation."""
    text = ["--data", args.data, *(["--held-out"] if args.held_out else [])]
    found: Steps = {}
    for who, out_dir in (("teacher", args.teacher), ("student", args.student)):
        found[f"{who}/perplexity"] = ["perplexity", out_dir, *text, "--context-tokens", str(args.context_tokens)]
        lengths = [str(length) for length in args.lengths]
        found[f"{who}/passkey"] = ["passkey", out_dir, "--lengths", *lengths, "--samples", "2", "--form", args.form]
        found[f"{who}/recall"] = ["recall", out_dir, "--pairs", "2", "4", "8"]
        found[f"{who}/ruler"] = ["ruler", out_dir, "--lengths", *lengths, "--samples", "10", "--form", args.form]
        if args.task_path:
            found[f"{who}/harness"] = ["harness", out_dir, "--task-path", args.task_path, "--tasks", args.tasks]
            found[f"{who}/harness"] += ["--limit", str(args.limit)] if args.limit else []
    show = ["--show", args.show] if args.show else []
    found["fidelity"] = ["fidelity", args.student, "--teacher", args.teacher, *text, *show]
    return found


def measured(args: argparse.Namespace, found: Steps) -> dict[str, dict[str, Any]]:
    """Runs what is not there yet; every result by its folder.

    Raises:
        UserError: an evaluation failed.
    """
    out = {}
    for number, (folder, arguments) in enumerate(found.items(), 1):
        out_dir = args.out / folder
        if args.again or not (out_dir / "result.json").is_file():
            print(f"[{number}/{len(found)}] {folder}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "lizard_jax.eval", *arguments, "--out", str(out_dir)]
            code = subprocess.run(command, check=False).returncode
            if code:
                raise UserError(f"{shlex.join(command[1:])} ended with exit code {code}")
        out[folder] = json.loads((out_dir / "result.json").read_text(encoding="utf-8"))
    return out


def numbers(name: str, result: dict[str, Any]) -> dict[str, float]:
    """What an evaluation comes down to."""
    if name == "perplexity":
        out = {"loss, nats a token": result["loss"], "bits per byte": result["bits_per_byte"]}
        return out | {f"loss of the same tokens at {row['extent']}×": row["loss"] for row in result["contexts"]}
    if name == "passkey":
        return {"passkeys found": result["accuracy"]}
    if name == "recall":
        return {"recall, among values": result["among_values"], "recall, whole vocabulary": result["accuracy"]}
    if name == "ruler":
        return {"RULER-style score": result["score"]}
    return {
        f"{task}, {key.removesuffix(',none')}": value
        for task, row in result["results"].items()
        for key, value in row.items()
        if isinstance(value, float) and "stderr" not in key
    }


def readme(args: argparse.Namespace, found: Steps, results: dict[str, dict[str, Any]]) -> str:
    """The page: numbers side by side, fidelity, pictures, commands."""
    lines = [f"# {args.title or args.out.name}: teacher and student", ""]
    if args.about:
        lines += [args.about, ""]
    lines += ["| | teacher | student |", "|---|---:|---:|"]
    for folder in found:
        who, _, name = folder.partition("/")
        if who != "teacher":
            continue
        theirs, ours = (numbers(name, results[f"{side}/{name}"]) for side in ("teacher", "student"))
        lines += [
            f"| {key} | {value:.4f} | {ours[key]:.4f} |"
            for key, value in theirs.items()
            if key in ours and value is not None
        ]
    close = results["fidelity"]
    lines += [
        "", f"Student against teacher on {close['tokens']:,} tokens: KL {close['kl']:.5f} nats, the same likeliest "
        f"token {100 * close['agreement']:.2f}% of the time.", "",
        "| layer | relative error of head outputs | distance of maps | window | gated | meta |",
        "|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    names = ("relative_error", "map_distance", "window_share", "gated_share", "meta_share")
    lines += [
        f"| {row['layer']} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |" for row in close["layers"]
    ]
    pictures = sorted(path.relative_to(args.out).as_posix() for path in args.out.rglob("*.png"))
    lines += ["", *(f"![{Path(name).parent}: {Path(name).stem}]({name})" for name in pictures), ""]
    if (args.out / "fidelity" / "generations.md").is_file():
        lines += ["Continuations of both side by side: [fidelity/generations.md](fidelity/generations.md).", ""]
    lines += ["## Commands", "", "```sh", *args.before]
    lines += [
        shlex.join(["uv", "run", "--extra", "eval", "python", "-m", "lizard_jax.eval", *arguments])
        for arguments in found.values()
    ]
    return "\n".join([*lines, "```", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="DIR", help="checkpoint of the teacher")
    parser.add_argument("--student", required=True, metavar="DIR", help="checkpoint of the student")
    parser.add_argument("--data", required=True, metavar="PATH", help="text that losses are measured on")
    parser.add_argument("--held-out", action="store_true", help="only what train.py keeps for validation")
    parser.add_argument("--show", metavar="PATH", help="text for attention maps and continuations (default: --data)")
    parser.add_argument(
        "--context-tokens", type=int, default=16384, help="predicted from each length of context (default %(default)s)"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048], help="of retrieval texts (default %(default)s)"
    )
    parser.add_argument("--form", default="alpaca", help="of questions: alpaca or plain (default %(default)s)")
    parser.add_argument("--task-path", metavar="DIR", help="task files for the harness; left out, it is not run")
    parser.add_argument("--tasks", default="hellaswag_local", help="of the harness (default %(default)s)")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--title", help="heading of the page (default: the folder's name)")
    parser.add_argument("--about", help="a line below it")
    parser.add_argument("--before", action="append", default=[], help="a command that goes before; may be repeated")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        found = steps(args)
        results = measured(args, found)
        write_atomic(args.out / "README.md", readme(args, found, results))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"tables and commands are in {args.out / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
