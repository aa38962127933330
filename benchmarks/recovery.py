"""How much of what a real language model knew its student keeps, at equal bytes of state.

    uv run --extra gguf benchmarks/smollm2.py runs/smollm2
    uv run benchmarks/recovery.py --teacher runs/smollm2 --train books.txt alpaca.json --score wikitext.txt
    uv run --extra eval benchmarks/recovery.py … --hellaswag hellaswag.txt.bz2 --book books.txt --lengths 1024 2048 4096

Rows are students of the teacher: ours; the same bytes with a quarter of the features and the window, or the kept pairs,
that this pays for, as many for every key head or as many as each needs; windows alone with the same real first tokens,
as wide, as wide as our state's bytes would buy, and with kept pairs in their place, either way; and with ``--heads``
two that keep some key heads whole. Each is scored before training, after stage 1 and after stage 2, all with one
budget, one order of the same data and one pair of learning rates. Loss is by position (the number of tokens before a
prediction), in articles or books of ``--score`` of which nothing was trained on: of each, its first tokens, as many as
the longest extent takes.
``±`` is the standard error of the mean difference from the teacher in the last bucket, paired by text.

Asked for by their flags: ``--hellaswag`` scores questions; ``--book`` hides in the last text of that file, which no
stage trains on, one passkey and then five of which one is asked for, through the tokenizer's chat template where it has
one, and asks to recall pairs of random tokens, all at ``--lengths``; ``--ask`` writes down what each answers.

Stages and scores that lie under ``--out`` are not made again, so a run that was cut off goes on, and rows of
``benchmarks/recovery.json`` that belong to the same settings stay. Writes that, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache as once
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from tqdm import tqdm

import lizard_jax
from benchmarks.equal_bytes import state_bytes, students
from benchmarks.recovery_tasks import done
from lizard_jax.atomic import write_atomic
from lizard_jax.cli import load_recipe
from lizard_jax.config import DataConfig, LizardConfig, preset
from lizard_jax.convert.load import load_hf
from lizard_jax.data.records import documents
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from lizard_jax.eval.perplexity import by_slices, token_losses
from lizard_jax.models import Llama
from lizard_jax.program import ended
from lizard_jax.select.budgets import Curves, automatic, read
from lizard_jax.select.choice import resolved
from lizard_jax.train.linearize import linearize

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
BUCKETS = (128, 512, 1024, 2048, 4096, 8192)
PIECE = 20_000
"""Characters of a training document, beyond which it is cut, so that no book crowds out the rest of a short run."""
HEADING = re.compile(r"\n \n = (?=[^=])")
"""Where an article of WikiText begins."""
WHENS = ("no training", "stage 1", "stage 2")


# ------------------------------------------------------------------------------------------------- what is compared


def needs(args: argparse.Namespace, text: Path) -> Curves:
    """What each key head needs, by the beginning of the training text."""
    file = args.out / "budgets.json"
    if not file.is_file():
        switches = dataclasses.replace(preset("lizard"), window=args.window)
        found = automatic(args.teacher, switches, data(args, text), dtype="float32")
        write_atomic(file, found.model_dump_json(indent=1) + "\n")
    return read(file)


def data(args: argparse.Namespace, text: Path) -> DataConfig:
    """Stage 1's text."""
    return DataConfig(path=str(text), sequence_length=args.length, batch_size=args.batch, segment_mask=False)


def sizes(args: argparse.Namespace, attention: LizardConfig | None) -> dict[str, int]:
    """By extent, the bytes of one sequence's state."""
    return {str(extent): state_bytes(args.teacher, attention, extent) for extent in args.extents}


# ------------------------------------------------------------------------------------------------- training


def folder(args: argparse.Namespace, name: str) -> Path:
    """Where the runs of a row go."""
    return args.out / re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)


def training_text(sources: list[Path], tokenizer: Any, out: Path) -> Path:
    """One text of all sources in random order; instructions and answers in the tokenizer's chat form.

    The last document of each plain text is left out: it is never trained on.
    """
    file = out / "train.txt"
    if file.is_file():
        return file
    texts: list[str] = []
    for source in sources:
        if source.suffix == ".json":
            for record in json.loads(source.read_text(encoding="utf-8")):
                question = "\n\n".join(part for part in (record["instruction"], record.get("input")) if part)
                chat = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
                texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
        else:
            whole = [document.text for document in documents(DataConfig(path=str(source)), tokenizer)]
            texts += whole[:-1]
    pieces = [text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)]
    order = np.random.default_rng(0).permutation(len(pieces))
    write_atomic(file, "<|endoftext|>".join(pieces[i] for i in order))
    return file


def flags(attention: LizardConfig) -> list[str]:
    """The command-line flags that make the attention of train.py's default recipe this one."""
    base, out = load_recipe("tiny", 1).attention, []
    for field in dataclasses.fields(LizardConfig):
        value = getattr(attention, field.name)
        if value != getattr(base, field.name):
            flag = field.name.replace("_", "-")
            value = ",".join(map(str, value)) if isinstance(value, tuple) else value
            out.append(f"--{flag}={value}" if not isinstance(value, bool) else f"--{flag}" if value else f"--no-{flag}")
    return out


def train(
    args: argparse.Namespace, attention: LizardConfig, stage: int, where: Path, text: Path,
    program: list[str] | None = None,
) -> None:  # fmt: skip
    """Run one stage, by train.py or another Python program, unless its result is there."""
    if (where / f"stage{stage}" / "result.json").is_file():
        return
    length = args.length if stage == 1 else args.length2
    tokens, rate = (args.tokens, args.learning_rate) if stage == 1 else (args.tokens2, args.learning_rate2)
    command = [
        sys.executable, *(program or [str(ROOT / "train.py")]), f"--stage={stage}", f"--out={where}",
        f"--teacher={args.teacher}", f"--data={text}", f"--sequence-length={length}", f"--batch-size={args.batch}",
        f"--tokens={tokens}", f"--learning-rate={rate}", "--no-segment-mask", f"--held-out-tokens={2 * length}",
        "--no-remat", "--state-bytes=", f"--validate-every={max(1, tokens // (args.batch * length) // 4)}",
        *(flags(attention) if stage == 1 or not attention.adds_modules else []),
        *([f"--kl={args.kl}"] if stage == 2 else []),
    ]  # fmt: skip
    print("$", shlex.join(command), flush=True)
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"stage {stage} in {where} failed; its last line says why")


def student(args: argparse.Namespace, attention: LizardConfig, when: str, where: Path, text: Path) -> Llama:
    """A row's model at one of ``WHENS``."""
    if when != WHENS[0]:
        return lizard_jax.load(str(where / when.replace(" ", "")))
    # As stage 1 starts: from the first batches of the same order.
    model, start = linearize(args.teacher, attention, data(args, text), dtype="float32")
    if start is not None:
        print(start.summary(), flush=True)
    return model


# ------------------------------------------------------------------------------------------------- scoring


def score_texts(args: argparse.Namespace, extent: int) -> np.ndarray:
    """The first ``extent + 1`` tokens of the first ``--texts`` articles or books that have as many, ``[texts, n]``."""
    tokenizer, rows = load_tokenizer(args.teacher), []
    for source in args.score:
        raw = source.read_text(encoding="utf-8")
        parts = raw.split("<|endoftext|>")[-1:] if "<|endoftext|>" in raw else HEADING.split(raw)
        for part in parts:
            ids = tokenizer(part.strip())["input_ids"]
            # Of a book, stretches as long as asked for; of an article, its beginning.
            stretches = len(ids) // (extent + 1) if len(parts) == 1 else min(1, len(ids) // (extent + 1))
            rows += [ids[at * (extent + 1) : (at + 1) * (extent + 1)] for at in range(stretches)]
    if not rows:
        raise UserError(f"no text of --score has {extent + 1} tokens; give longer texts or fewer --extents")
    return np.asarray(rows[: args.texts], np.int32)


def losses(model: Llama, rows: np.ndarray) -> np.ndarray:
    """Loss in nats of every token but the first of each row, ``[rows, n - 1]``."""

    @jax.jit
    def one(model: Llama, row: jax.Array) -> jax.Array:
        hidden = model.hidden(row[:, :-1])
        return by_slices(model, lambda h, t: token_losses(model.logits(h), t), hidden, row[:, 1:])[0]

    return np.stack([np.asarray(one(model, jnp.asarray(row[None]))) for row in tqdm(rows, unit="text", leave=False)])


def buckets(extent: int) -> list[tuple[int, int]]:
    """First and last + 1 position of each bucket up to ``extent``."""
    ends = [end for end in BUCKETS if end < extent] + [extent]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def scored(args: argparse.Namespace, ready: Callable[[], Llama], where: Path) -> dict[str, list[list[float]]]:
    """By extent, each text's mean loss in each bucket."""
    kept = where / "losses.json"
    found: dict[str, list[list[float]]] = json.loads(kept.read_text()) if kept.is_file() else {}
    missing = [extent for extent in args.extents if len(found.get(str(extent), [])) < args.texts]
    for extent in missing:
        rows = score_texts(args, extent)
        if len(found.get(str(extent), [])) == len(rows):
            continue
        each = losses(ready(), rows)
        found[str(extent)] = [[float(row[a:b].mean()) for a, b in buckets(extent)] for row in each]
        where.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(found) + "\n")
    return {str(extent): found[str(extent)] for extent in args.extents}


# ------------------------------------------------------------------------------------------------- the table


def summary(mine: dict[str, list[list[float]]], teacher: dict[str, list[list[float]]]) -> dict[str, Any]:
    """By extent: mean loss of each bucket, and the paired standard error against the teacher in the last."""
    out = {}
    for extent, rows in mine.items():
        difference = np.asarray(rows)[:, -1] - np.asarray(teacher[extent])[:, -1]
        error = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else 0.0
        out[extent] = {"losses": np.mean(rows, axis=0).tolist(), "error": error, "texts": len(rows)}
    return out


def task_table(rows: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: each row's percentages, by task and length; nothing where no task was asked for."""
    columns = [
        (task, part)
        for task, found in rows["teacher"].get("tasks", {}).items() if task != "answers" for part in found
    ]  # fmt: skip
    if not columns:
        return
    heads = [f"{task} {part if task == 'hellaswag' else f'{int(part):,}'}" for task, part in columns]
    yield from ("Percent right:", "", "| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads))
    for name, row in rows.items():
        found = row.get("tasks", {})
        cells = [f"{found[task][part]:.1f}" if part in found.get(task, {}) else "" for task, part in columns]
        if any(cells):
            yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A row with what was measured of it now, and what earlier runs did at other extents or tasks."""
    return {part: old.get(part, {}) | new.get(part, {}) for part in ("bytes", "scores", "tasks")}


def write(args: argparse.Namespace, settings: dict[str, Any], rows: dict[str, Any]) -> None:
    """The table as JSON and Markdown, and as a picture."""
    stem = args.table
    old = json.loads(stem.with_suffix(".json").read_text()) if stem.with_suffix(".json").is_file() else {}
    if old.get("settings") == settings:
        rows = {name: merged(row, rows.get(name, {})) for name, row in old["rows"].items()} | {
            name: row for name, row in rows.items() if name not in old["rows"]
        }
    write_atomic(stem.with_suffix(".json"), json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    lines = list(task_table(rows))
    for extent in map(str, args.extents):
        names = [f"{a}–{b - 1}" for a, b in buckets(int(extent))]
        texts = rows["teacher"]["scores"][extent]["texts"]
        lines += [f"First {int(extent):,} tokens of {texts} texts; loss in nats by position:", ""]
        lines += ["| | MiB of state | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
        for name, row in rows.items():
            if extent not in row["scores"]:
                continue
            cells = [f"{loss:.3f}" for loss in row["scores"][extent]["losses"]]
            if name != "teacher":
                cells[-1] += f" ± {row['scores'][extent]['error']:.3f}"
            size = row["bytes"][extent]
            lines.append(f"| {name} | {size / 2**20:.2f} | " + " | ".join(cells) + " |")
        lines.append("")
    write_atomic(stem.with_suffix(".md"), "\n".join(lines[:-1]) + "\n")
    print("\n".join(lines))

    said = [f"# {name}\n\n" + "\n\n".join(f"**{q}**\n\n{a}" for q, a in row["tasks"]["answers"].items())
            for name, row in rows.items() if "answers" in row.get("tasks", {})]  # fmt: skip
    if said:
        write_atomic(stem.with_name(f"{stem.name}_answers.md"), "\n\n".join(said) + "\n")

    longest = str(max(args.extents))
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    ends = [end for _, end in buckets(int(longest))]
    for name, row in rows.items():
        if longest in row["scores"]:
            style = "k--" if name == "teacher" else "o-" if name.startswith("lizard") else "s:"
            label = f"{name} ({row['bytes'][longest] / 2**20:.1f} MiB)"
            axis.plot(ends, row["scores"][longest]["losses"], style, label=label)
    axis.set(xscale="log", xlabel="position, up to", ylabel="loss, nats a token")
    axis.minorticks_off()
    axis.set_xticks(ends, [f"{end:,}" for end in ends])
    axis.legend(fontsize="small")
    figure.savefig(stem.with_suffix(".png"), dpi=110)


def add_budget(parser: argparse.ArgumentParser) -> None:
    """The flags of texts and budgets."""
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="HF directory of the teacher")
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="PATH", help="texts and Alpaca JSON")
    parser.add_argument("--score", type=Path, nargs="+", required=True, metavar="PATH", help="texts that are scored")
    parser.add_argument("--window", type=int, default=128, help="W (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=300_000, help="of stage 1 (default %(default)s)")
    parser.add_argument("--tokens2", type=int, default=100_000, help="of stage 2 (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of stage 1 (default %(default)s)")
    parser.add_argument("--learning-rate2", type=float, default=1e-3, help="of stage 2 (default %(default)s)")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens of a sequence in stage 1 (default %(default)s)"
    )
    parser.add_argument("--length2", type=int, default=1024, help="the same in stage 2 (default %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step (default %(default)s)")
    parser.add_argument("--extents", type=int, nargs="+", default=[2048], help="tokens of a text that are scored")
    parser.add_argument("--texts", type=int, default=8, help="most texts of each extent (default %(default)s)")


def main() -> int:
    """Train what is missing, score it, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_budget(parser)
    parser.add_argument("--kl", type=float, default=0.9, help="the KL's share in stage 2 (default %(default)s)")
    parser.add_argument("--hellaswag", type=Path, metavar="FILE", help="questions, six lines each (see local_tasks.py)")
    parser.add_argument("--questions", type=int, default=400, help="most of them (default %(default)s)")
    parser.add_argument("--book", type=Path, metavar="PATH", help="hide passkeys in the last document of this text")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="of texts that hide some")
    parser.add_argument("--samples", type=int, default=8, help="texts of each length (default %(default)s)")
    parser.add_argument("--ask", action="store_true", help="write down some answers of each row")
    parser.add_argument(
        "--heads", default="", metavar="FILE:N", help="rows whose exact key heads a ranking of `lizard select` names"
    )
    parser.add_argument("--rows", nargs="+", default=None, help="these rows alone")
    parser.add_argument("--whens", nargs="+", choices=WHENS, default=WHENS, help="these moments alone")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"), help="where the runs go")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "recovery", help="the table, less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; what is trained and scored so far is kept")


def check(teacher: Path, *texts: Path | None) -> None:
    """Refuses what is not there before anything slow begins.

    Raises:
        UserError: there is no checkpoint at ``teacher``, or a text is missing.
    """
    if not (teacher / "config.json").is_file():
        raise UserError(f"no checkpoint at {teacher}; give the HF directory of the teacher")
    for text in texts:
        if text is not None and not text.is_file():
            raise UserError(f"no text at {text}")


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    check(args.teacher, *args.train, *args.score, args.hellaswag, args.book)
    tokenizer = load_tokenizer(args.teacher)
    if args.ask and not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {args.teacher} has no chat template to ask through; leave out --ask")
    args.out.mkdir(parents=True, exist_ok=True)
    text = training_text(args.train, tokenizer, args.out)
    exact = resolved(args.heads, args.teacher, args.window) if args.heads else ()
    splits = any("by head" in name for name in args.rows or ("by head",))
    variants = students(args.window, args.teacher, exact, needs(args, text) if splits else None)
    unknown = set(args.rows or ()) - set(variants)
    if unknown:
        raise UserError(f"no row {', '.join(sorted(unknown))}; choose from {', '.join(variants)}")
    for extent in args.extents:
        score_texts(args, extent)
    original = once(lambda: load_hf(args.teacher, dtype="float32"))
    teacher = scored(args, original, args.out / "teacher")
    rows: dict[str, Any] = {
        "teacher": {
            "bytes": sizes(args, None), "scores": summary(teacher, teacher),
            "tasks": done(args, original, args.out / "teacher"),
        }
    }  # fmt: skip
    original.cache_clear()
    keep = (
        "window",
        "tokens",
        "tokens2",
        "learning_rate",
        "learning_rate2",
        "kl",
        "length",
        "length2",
        "batch",
        "texts",
    )
    settings = {name: getattr(args, name) for name in keep} | {
        "train": [path.name for path in args.train], "score": [path.name for path in args.score],
    }  # fmt: skip
    for name in args.rows or variants:
        attention = variants[name]
        where = folder(args, name)
        for number, when in enumerate(WHENS):
            if when not in args.whens or (number == 1 and not attention.adds_modules):
                continue
            if number:
                train(args, attention, number, where, text)
            kept = where / "scores" / when.replace(" ", "_")
            ready = once(lambda a=attention, w=when, p=where: student(args, a, w, p, text))
            rows[f"{name}, {when}"] = {
                "bytes": sizes(args, attention),
                "scores": summary(scored(args, ready, kept), teacher), "tasks": done(args, ready, kept),
            }  # fmt: skip
            write(args, settings, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
