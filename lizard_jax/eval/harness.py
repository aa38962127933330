"""Score a checkpoint on the tasks of lm-evaluation-harness, by their names.

python -m lizard_jax.eval harness CKPT --tasks piqa,arc_easy,arc_challenge,hellaswag,winogrande,mmlu
python -m lizard_jax.eval harness CKPT --task-path my_tasks --tasks my_task --limit 100

mmlu is 5-shot unless --num-fewshot says otherwise; other tasks take what they are configured for. Tasks load their data
from the Hugging Face hub. Where there is none, --task-path names a directory of task files (YAML, as the harness
documents them) with local data: dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}, relative to it.
"""

import argparse
import contextlib
import difflib
import fnmatch
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from lizard_jax.errors import UserError
from lizard_jax.eval import _checkpoint
from lizard_jax.eval.results import prepare, write

NAME = "harness"
HELP = "tasks of lm-evaluation-harness: piqa, hellaswag, mmlu, …, or local task files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    _checkpoint.add_arguments(parser)
    parser.add_argument("--tasks", required=True, metavar="A,B,…", help="names of tasks or groups; * and ? match any")
    parser.add_argument("--task-path", metavar="DIR", help="directory with task files of your own")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before each question")
    parser.add_argument(
        "--limit", type=float, metavar="N", help="at most N documents of each task; below 1, that fraction of them"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="texts read at once (default %(default)s)")
    parser.add_argument(
        "--max-length", type=int, metavar="N",
        help="most tokens of a text; longer ones lose their beginning (default: the positions of the configuration)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where to write result.json")


def run(args: argparse.Namespace) -> None:
    """Prints the harness's table, then a line that begins with each task's scores.

    Raises:
        UserError: a value out of range, an unknown task, data or a checkpoint that is not there, no lm-eval.
    """
    for name in ("batch_size", "max_length", "limit", "num_fewshot"):
        value = getattr(args, name)
        if value is not None and (value < 0 or (value == 0 and name != "num_fewshot")):
            raise UserError(
                f"--{name.replace('_', '-')} is {value:g}, must be {'0 or more' if name[0] == 'n' else 'above 0'}"
            )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "the harness is not installed; use the extra eval: uv run --extra eval python -m lizard_jax.eval …"
        )
    out_dir = prepare(args.out)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    chosen = load_tasks(names, task_path=args.task_path, num_fewshot=args.num_fewshot)

    from lizard_jax.eval._lm import LizardLM
    from lizard_jax.generate.prompts import end_tokens, text_tokenizer

    model = _checkpoint.load(args)
    tokenizer = text_tokenizer(model.source)
    lm = LizardLM(
        model, tokenizer, end=end_tokens(model.source, tokenizer), batch_size=args.batch_size,
        max_length=args.max_length,
    )  # fmt: skip
    began = time.perf_counter()
    results = evaluate(lm, chosen, limit=args.limit)
    seconds = time.perf_counter() - began

    import lm_eval
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if out_dir is not None:
        kept = ("results", "groups", "n-shot", "versions", "higher_is_better", "n-samples")
        record = {
            **{name: results[name] for name in kept if name in results}, "max_length": lm.max_length,
            "requests": lm.answered, "tokens_read": lm.scorer.tokens_read, "seconds": seconds,
            "lm_eval": lm_eval.__version__,
        }  # fmt: skip
        write(out_dir, args, json.loads(json.dumps(record, default=handle_non_serializable)), {})
    print(f"{summary(results, chosen)} requests={lm.answered} seconds={seconds:.1f}")


def load_tasks(names: Sequence[str], *, task_path: str | None = None, num_fewshot: int | None = None) -> dict[str, Any]:
    """The harness's tasks of these names, with their data, ready for ``evaluate``.

    Relative data files are looked for in ``task_path``. Its tasks hide the harness's own of the same name.

    Raises:
        UserError: no such task, a task named twice, data that cannot be loaded, or a template that does not fit it.
    """
    from lm_eval.tasks import TaskManager

    if not names:
        raise UserError("no task named; give --tasks A,B,…")
    directory = None
    if task_path is not None:
        directory = Path(task_path).expanduser().resolve()
        if not directory.is_dir():
            raise UserError(f"no task files at {task_path}: it is not a directory")
    # The harness's own 14,000 take seconds to find, and local tasks may be all that is asked for.
    manager = TaskManager(include_path=str(directory), include_defaults=False) if directory else None
    if manager is None or not all(_matching(name, manager.all_tasks) for name in names):
        manager = TaskManager(include_path=str(directory) if directory else None)
    wanted: list[str] = []
    for name in names:
        found = _matching(name, manager.all_tasks)
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"near it: {', '.join(near)}" if near else "the harness's documentation lists them"
            raise UserError(f"unknown task {name}; {hint}")
        wanted += found
    chosen: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    origin: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        # Whatever a task's file, its Python code or its data set's reader trip over comes out here.
        try:
            with contextlib.chdir(directory or "."):
                loaded = manager.load([name])
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            hint = "; where the hub cannot be reached, --task-path takes tasks with local data"
            raise UserError(f"task {name} cannot be loaded: {reason}{hint * isinstance(error, OSError)}") from None
        for task in loaded["tasks"]:
            if origin.setdefault(task, name) != name:
                raise UserError(f"task {task} is asked for twice, by {origin[task]} and by {name}")
        for kind in chosen:
            chosen[kind] |= loaded.get(kind, {})
    for name, task in chosen["tasks"].items():
        configured = task.get_config("num_fewshot")
        # A task that says 0 itself is made for it: the harness too leaves it so.
        if configured is None or (num_fewshot is not None and configured != 0):
            usual = 5 if name.startswith("mmlu") else 0
            task.set_config(key="num_fewshot", value=usual if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=1234)
    chosen["asked"] = list(dict.fromkeys(wanted))
    return chosen


def evaluate(lm: Any, chosen: dict[str, Any], *, limit: float | None = None, samples: bool = False) -> dict[str, Any]:
    """The harness's results of any of its models, on ``load_tasks``'s tasks; ``samples`` adds each request's answer."""
    from lm_eval.evaluator import evaluate as evaluate_tasks

    tasks = {kind: chosen[kind] for kind in ("tasks", "groups", "group_map")}
    with _aside():
        results = evaluate_tasks(
            # A limit below 1 is a fraction, which the harness's annotation forgets.
            lm=lm, task_dict=cast(Any, tasks), limit=cast(Any, limit), bootstrap_iters=1000, log_samples=samples,
        )  # fmt: skip
    return cast(dict[str, Any], results)


def summary(results: dict[str, Any], chosen: dict[str, Any]) -> str:
    """``task metric=value …`` of everything that was asked for; of a group its own scores."""
    lines = []
    for name, scores in results["results"].items():
        inside = any(name in members for members in chosen["group_map"].values())
        if inside and name not in chosen["asked"]:
            continue
        values = [
            f"{key.split(',')[0]}={value:.4f}" for key, value in scores.items()
            if isinstance(value, float) and "_stderr" not in key
        ]  # fmt: skip
        lines.append(" ".join([name, *values]))
    return "; ".join(lines)


def _matching(name: str, known: Sequence[str]) -> list[str]:
    return [name] if name in known else fnmatch.filter(known, name)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """The harness's remarks go to stderr, and it starts no processes: a fork of a process that runs JAX may hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
