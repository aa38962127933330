"""What a byte of state buys: loss and recall of untrained students against the bytes of a sequence.

    uv run benchmarks/frontier.py --teacher runs/smollm2 --curves needs/budgets.json --heads heads/heads.json \\
        --wiki wikitext.txt --book books.txt

Families of students of one teacher, each at several sizes, named by the tokens of a window of equal bytes: a window
alone, a window of ``--window`` with as many kept pairs for every key head, with as many as each head needs (by
``--curves``), the same beside exact heads (by ``--heads``) that see ``--reach`` tokens, or as many as the size pays
for, some with another share of it than the default, and whole layers that keep softmax attention (those that need
most, by the curves). None of these is trained, and nothing here was seen by curves or ranking. Trained students join
by ``--students NAME=DIR``: a stage directory, a Flax or an HF directory each.

Loss is in nats of the second half of ``--lengths`` tokens: in the beginnings of articles of ``--wiki``, and where those
are too short in stretches of the last document of ``--book``. A needle is a string of five tokens told once in that
document, right where every token of it is the likeliest. Rows that lie in the table are not made again. Writes
``benchmarks/frontier.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from tqdm import tqdm

from benchmarks import named
from benchmarks.equal_bytes import LONGEST, pairs_worth
from benchmarks.recovery import score_texts
from lizard_jax.atomic import write_atomic
from lizard_jax.config import LizardConfig, ModelConfig
from lizard_jax.convert.files import read_json
from lizard_jax.convert.hf_config import model_config
from lizard_jax.convert.load import load_hf
from lizard_jax.data.haystack import Measure, sentences
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from lizard_jax.models import Llama
from lizard_jax.program import ended
from lizard_jax.select import budgets, choice
from lizard_jax.select.needles import Needles, make
from lizard_jax.select.rank import loss_behind

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "pairs by need": (1024, 258, 512),
    "pairs by need, 10% exact": (1024,),
    "pairs by need, 10% exact by 60%": (1024, 512, 258),
    "pairs by need, 10% exact by 92%": (1024, 512, 258),
    "pairs by need, 5% exact": (1024, 768),
    "window": (1024, 258, 512),
    "pairs alike": (1024, 258, 512),
    "exact layers": (1024,),
}
"""Tokens of a window of equal bytes, by family. A share of the key heads is exact, for as many tokens as a share of
what windows leave of the state pays for: ``budgets.EXACT_SHARE``, or the one told."""
EXACT = re.compile(r".*?(\d+%) exact(?: by (\d+)%)?")
LONG_SEED = 4
"""Of the needles, other than any that ranked."""


def student(args: argparse.Namespace, config: ModelConfig, family: str, tokens: int) -> LizardConfig:
    """The attention of a family whose state takes at most as many bytes as a window of ``tokens``.

    Raises:
        UserError: not even the family's least fits.
    """
    near = LizardConfig(memory="none", window=args.window)
    limit = budgets.size(f"{tokens}tokens@{LONGEST}", config, near)
    if family == "window":
        return dataclasses.replace(near, window=tokens)
    if family == "pairs alike":
        return dataclasses.replace(near, kept=pairs_worth(tokens, args.window, config.head_dim))
    curves = budgets.read(args.curves)
    if family == "exact layers":
        cache = 4 * config.head_dim * config.kv_heads * LONGEST
        least = budgets.state_bytes(dataclasses.replace(config, attention=near), LONGEST)
        count = int((limit.bytes - least) // (cache - least // config.num_layers))
        need = curves.array[..., 0].sum(axis=1)
        return dataclasses.replace(near, softmax_layers=tuple(sorted(map(int, np.argsort(-need)[:count]))))
    if match := EXACT.fullmatch(family):
        heads, share = choice.best(choice.read(args.heads), match[1], config), match[2]
        near = dataclasses.replace(near, softmax_heads=heads, retrieval_window=args.reach)
        reach = budgets.reach(limit, config, near, int(share) / 100 if share else budgets.EXACT_SHARE)
        near = dataclasses.replace(near, retrieval_window=reach)
    return budgets.spend(curves, limit, config, near).switches


def texts(args: argparse.Namespace, length: int) -> np.ndarray:
    """Texts of exactly ``length`` tokens."""
    fields = {"teacher": args.teacher, "texts": args.texts}
    try:
        return score_texts(argparse.Namespace(score=[args.wiki], **fields), length - 1)
    except UserError:
        return score_texts(argparse.Namespace(score=[args.book], **fields), length - 1)


def scores(model: Llama, rows: np.ndarray, needles: Needles) -> dict[str, float]:
    """The loss of the second half of each text, and the share of needles found."""
    hidden = jax.jit(lambda model, ids: model.hidden(ids[None]))

    @jax.jit
    def logs(model: Llama, x: jax.Array, at: jax.Array) -> jax.Array:
        return model.logits(jnp.take_along_axis(x, at[None, :, None], axis=1))[0]

    losses, right = [], 0
    for ids in tqdm(rows, unit="text", leave=False, disable=None):
        tokens = jnp.asarray(ids)
        losses.append(float(loss_behind(model, hidden(model, tokens), tokens, len(ids) // 2)))
    for i in range(len(needles.tokens)):
        found = logs(model, hidden(model, jnp.asarray(needles.tokens[i])), jnp.asarray(needles.rows[i]))
        right += bool((np.asarray(found).argmax(-1) == needles.answers[i])[needles.real[i]].all())
    return {"loss": float(np.mean(losses)), "needles": right / len(needles.tokens)}


def run(args: argparse.Namespace) -> int:
    """The work of ``main``."""
    config = model_config(read_json(args.teacher / "config.json"))
    measure = Measure(
        load_tokenizer(args.teacher), sentences(args.book.read_text(encoding="utf-8").split("<|endoftext|>")[-1])
    )
    cases: dict[str, tuple[str, Callable[[], Llama]]] = {
        "teacher": ("teacher", partial(load_hf, args.teacher, dtype="float32"))
    }
    for family, sizes in SIZES.items():
        for tokens in sizes:
            switches = student(args, config, family, tokens)
            make_one = partial(load_hf, args.teacher, attention=switches, dtype="float32")
            cases[f"{family}, {tokens:,}"] = (family, make_one)
    for name, load in named.students(args.students).items():
        cases[name] = ("trained", load)
    if unknown := set(args.rows) - set(cases):
        raise UserError(f"no row {', '.join(sorted(unknown))}; choose from {'; '.join(cases)}")
    names = ("window", "reach", "texts", "needles")
    settings = {name: getattr(args, name) for name in names}
    file = args.table.with_suffix(".json")
    old = json.loads(file.read_text()) if file.is_file() else {}
    rows: dict[str, Any] = old["rows"] if old.get("settings") == settings else {}
    scored = {length: texts(args, length) for length in args.lengths}
    hidden = {length: make(measure, length, args.needles, seed=LONG_SEED) for length in args.lengths}
    for name, (family, make_one) in tqdm(cases.items(), unit="row", disable=None):
        missing = [n for n in args.lengths if str(n) not in rows.get(name, {}).get("scores", {})]
        if not missing or (args.rows and name not in (*args.rows, "teacher")):
            continue
        model = make_one()
        row = rows.setdefault(name, {"family": family, "bytes": 0, "scores": {}})
        row["bytes"] = budgets.state_bytes(model.config, LONGEST)
        for length in missing:
            row["scores"][str(length)] = scores(model, scored[length], hidden[length])
            print(name, length, json.dumps(row["scores"][str(length)]), flush=True)
            write_atomic(file, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    show(args, rows)
    return 0


def show(args: argparse.Namespace, rows: dict[str, Any]) -> None:
    """The table as Markdown, and as a picture."""
    whole, lengths = rows["teacher"]["bytes"], sorted(map(int, rows["teacher"]["scores"]))
    heads = [f"loss at {length:,}" for length in lengths] + [f"needles at {length:,}" for length in lengths]
    lines = [f"| | MiB at {LONGEST:,} | of the cache | " + " | ".join(heads) + " |"]
    lines += ["|---|---:|---:|" + "---:|" * len(heads)]
    for name, row in rows.items():
        found = [row["scores"].get(str(length)) for length in lengths]
        cells = [f"{one['loss']:.3f}" if one else "" for one in found]
        cells += [f"{one['needles']:.0%}" if one else "" for one in found]
        size = row["bytes"]
        lines.append(f"| {name} | {size / 2**20:.2f} | {size / whole:.1%} | " + " | ".join(cells) + " |")
    write_atomic(args.table.with_suffix(".md"), "\n".join(lines) + "\n")
    print("\n".join(lines))
    sizes = sorted({round(row["bytes"] / 2**20) for row in rows.values() if row["family"] != "teacher"})
    figure, axes = plt.subplots(2, len(lengths), figsize=(12, 7), layout="constrained", squeeze=False)
    for column, length in enumerate(lengths):
        for line, part in enumerate(("loss", "needles")):
            axis = axes[line][column]
            for number, family in enumerate((*SIZES, "trained")):
                own = [row for row in rows.values() if row["family"] == family and str(length) in row["scores"]]
                own.sort(key=lambda row: row["bytes"])
                style = {"linestyle": "", "marker": "*", "markersize": 11} if family == "trained" else {"marker": "o"}
                axis.plot(
                    [row["bytes"] / 2**20 for row in own], [row["scores"][str(length)][part] for row in own],
                    label=family, color=f"C{number}", **style,
                )  # fmt: skip
            axis.axhline(rows["teacher"]["scores"][str(length)][part], color="k", linestyle="--", label="teacher")
            axis.set(title=f"{part} at {length:,} tokens", xlabel="MiB a sequence", xscale="log")
            axis.set_xlim(0.8 * sizes[0], 1.25 * sizes[-1])
            axis.minorticks_off()
            axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
            if part == "needles":
                axis.set_ylim(-0.05, 1.05)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(args.table.with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> int:
    """Score what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="HF directory of the teacher")
    parser.add_argument("--curves", type=Path, required=True, metavar="FILE", help="of `lizard select --by error`")
    parser.add_argument("--heads", type=Path, required=True, metavar="FILE", help="of `lizard select`")
    parser.add_argument("--wiki", type=Path, required=True, metavar="FILE", help="articles under WikiText's headings")
    parser.add_argument("--book", type=Path, required=True, metavar="FILE", help="its last document is read")
    parser.add_argument("--window", type=int, default=128, help="W beside pairs (default %(default)s)")
    parser.add_argument("--reach", type=int, default=8192, help="tokens of exact heads (default %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="default %(default)s")
    parser.add_argument("--texts", type=int, default=4, help="most texts of a length (default %(default)s)")
    parser.add_argument("--needles", type=int, default=4, help="needles of a length (default %(default)s)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="these rows alone, and the teacher")
    parser.add_argument("--students", nargs="+", default=[], metavar="NAME=DIR", help="trained students beside them")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "frontier", help="the table, less suffix")
    args = parser.parse_args()
    return ended(lambda: run(args), interrupted="interrupted; the rows so far are kept")


if __name__ == "__main__":
    sys.exit(main())
