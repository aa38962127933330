"""Which variant keeps the teacher's quality: the four presets and a window-only control, on one teacher and one text.

    python benchmarks/variants.py --teacher ../shared/data/babyllama --data ../shared/data/tinystories.txt --window 32
    python benchmarks/variants.py --set choices …     # what our preset's own switches are worth
    python benchmarks/variants.py --set starts …      # what its start, and the teacher's help in stage 2, are worth

Every variant is trained by ``train.py`` with the same budget, data order and learning rates, then scored before
training, after stage 1 and after stage 2. Scoring: held-out documents joined as the tokenizer begins them (BOS), no
document mask, contexts of 1×, 2× and 4× the teacher's trained length, and always the same last tokens (one trained
length) of every context. ``±`` is the standard error of the mean difference from the teacher at 1×, paired by span.

A stage hands on the best of its validations, on tokens that are among those scored.

Writes ``benchmarks/<set>_w<W>.json``, ``.md`` and ``.png``. Stages that already lie under ``--out`` are not trained
again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

import lizard_jax
from lizard_jax.cli import from_dict
from lizard_jax.config import DataConfig, LizardConfig
from lizard_jax.convert.load import load_hf
from lizard_jax.data.loader import Loader
from lizard_jax.data.text import load_tokenizer
from lizard_jax.models import Llama
from lizard_jax.train.linearize import linearize

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, list[str]] = {
    "lizard_paper": ["--preset=lizard_paper"],
    "lizard_sink": ["--preset=lizard_sink"],
    "lolcats": ["--preset=lolcats"],
    "lizard": ["--preset=lizard"],
    "window_only": ["--preset=lizard", "--memory=none"],
}
CHOICES: dict[str, list[str]] = {
    "lizard": ["--preset=lizard"],
    "query_states": ["--preset=lizard", "--state-heads=query"],
    "softmax_maps": ["--preset=lizard", "--act=softmax", "--feature-start=identity", "--beta-start=0"],
    "half_features": ["--preset=lizard", "--feature-half=8"],
    "no_gate": ["--preset=lizard", "--gate=none", "--no-gate-bias"],
    "frozen_new": ["--preset=lizard"],
}
FIXED = ["--no-measured-start", "--beta-start=-3"]
STARTS: dict[str, list[str]] = {
    "lizard": ["--preset=lizard"],
    "sink": ["--preset=lizard", "--meta=sink"],
    "random_maps": ["--preset=lizard", "--feature-start=random"],
    "fixed_start": ["--preset=lizard", *FIXED],
    "all_three": ["--preset=lizard", "--meta=sink", "--feature-start=random", *FIXED],
    "no_kl": ["--preset=lizard"],
    "kl_alone": ["--preset=lizard"],
}
STAGE2: dict[str, list[str]] = {"frozen_new": ["--no-train-new"], "no_kl": ["--kl=0"], "kl_alone": ["--kl=1"]}
SETS = {"variants": VARIANTS, "choices": CHOICES, "starts": STARTS}
NO_STAGE1 = {"window_only"}
"""Variants without modules of their own, which start with stage 2."""
SPANS = 208
EXTENTS = (1, 2, 4)
ROWS = 16
HELD_OUT = 0.04


def held_out_tokens(arguments: argparse.Namespace) -> np.ndarray:
    """The held-out documents' tokens, end to end: documents no run trains on."""
    config = DataConfig(
        path=arguments.data, sequence_length=arguments.length, batch_size=1, held_out=HELD_OUT,
        held_out_tokens=10**9, segment_mask=False,
    )  # fmt: skip
    loader = Loader(config, load_tokenizer(arguments.teacher), vocab_size=10**9)
    return np.concatenate([batch.inputs[batch.segment_ids > 0] for batch in loader.held_out()])


def span_losses(model: Llama, tokens: np.ndarray, length: int) -> dict[str, list[float]]:
    """Mean loss of each span of ``length`` tokens, the last of contexts 1×, 2×, 4× ``length``."""

    @jax.jit
    def score(model: Llama, window: jax.Array) -> jax.Array:
        hidden = model.hidden(window[:, :-1])[:, -length:]
        logits = model.logits(hidden)
        picked = jnp.take_along_axis(logits, window[:, -length:, None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).mean(axis=1)

    first = max(EXTENTS) * length + 1
    spans = min(SPANS, (len(tokens) - first) // length + 1)
    ends = first + length * np.arange(spans)
    out: dict[str, list[float]] = {}
    for extent in EXTENTS:
        windows = np.stack([tokens[end - extent * length - 1 : end] for end in ends])
        rows = [score(model, jnp.asarray(windows[at : at + ROWS])) for at in range(0, spans, ROWS)]
        out[f"{extent}x"] = [float(x) for row in rows for x in row]
    return out


def train(arguments: argparse.Namespace, name: str, stage: int) -> Path:
    """Run one stage of one variant unless its result is there; returns the stage's directory."""
    out = Path(arguments.out) / f"w{arguments.window}" / name
    where = out / f"stage{stage}"
    if (where / "result.json").is_file():
        return where
    tokens = arguments.tokens if stage == 1 else arguments.tokens2
    command = [
        sys.executable, str(ROOT / "train.py"), f"--stage={stage}", f"--out={out}", f"--teacher={arguments.teacher}",
        f"--data={arguments.data}", f"--sequence-length={arguments.length}", "--batch-size=8",
        f"--tokens={tokens}", f"--validate-every={-(-tokens // (3 * 8 * arguments.length))}",
        f"--learning-rate={arguments.learning_rate if stage == 1 else arguments.learning_rate2}",
        "--no-segment-mask", f"--held-out={HELD_OUT}", "--held-out-tokens=16384", "--no-remat",
    ]  # fmt: skip
    if stage == 1 or name in NO_STAGE1:
        # The preset as it is: the default recipe's own width of features and pairs are not its.
        own = ["--kept=0", "--feature-half=0", *SETS[arguments.set][name]]
        command += [*own, f"--window={arguments.window}", "--chunk=64"]
    if stage == 2:
        command += STAGE2.get(name, [])
    print("$", *command, flush=True)
    subprocess.run(command, check=True)
    return where


def measure(arguments: argparse.Namespace, name: str, tokens: np.ndarray) -> dict[str, Any]:
    """Span losses of one variant before, after stage 1 and after stage 2, kept beside its runs."""
    stages = {f"stage {stage}": train(arguments, name, stage) for stage in ((2,) if name in NO_STAGE1 else (1, 2))}
    second = stages["stage 2"]
    kept = second.parent / "spans.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    run = json.loads((second / "run.json").read_text())["config"]
    attention, data = from_dict(LizardConfig, run["attention"]), from_dict(DataConfig, run["data"])
    result = {"before": span_losses(linearize(arguments.teacher, attention, data)[0], tokens, arguments.length)}
    for when, where in stages.items():
        result[when] = span_losses(lizard_jax.load(str(where)), tokens, arguments.length)
    kept.write_text(json.dumps(result))
    return result


def summarize(spans: dict[str, list[float]], teacher: list[float]) -> dict[str, dict[str, float]]:
    """Mean loss at each extent, its ratio to the teacher's at 1×, and the paired standard error."""
    base = np.asarray(teacher)
    out = {}
    for extent, values in spans.items():
        difference = np.asarray(values) - base
        error = float(difference.std(ddof=1) / len(difference) ** 0.5)
        out[extent] = {"loss": float(np.mean(values)), "ratio": float(np.mean(values) / base.mean()), "error": error}
    return out


def write(arguments: argparse.Namespace, table: dict[str, Any]) -> None:
    """The table as JSON and Markdown, and as a plot."""
    stem = ROOT / "benchmarks" / f"{arguments.set}_w{arguments.window}"
    stem.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
    lines = ["| variant | " + " | ".join(f"{e}×" for e in EXTENTS) + " | 1× against the teacher |", "|---" * 5 + "|"]
    for name, row in table["rows"].items():
        cells = [f"{row[f'{e}x']['loss']:.4f} ± {row[f'{e}x']['error']:.4f}" for e in EXTENTS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {100 * (row['1x']['ratio'] - 1):+.2f}% |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, when in zip(axes, ("stage 1", "stage 2"), strict=True):
        for name, row in table["rows"].items():
            if name == "teacher" or name.endswith(when):
                losses = [row[f"{extent}x"]["loss"] for extent in EXTENTS]
                axis.plot(EXTENTS, losses, "k--" if name == "teacher" else "o-", label=name.removesuffix(f", {when}"))
        axis.set(title=f"after {when}, W={arguments.window}", xlabel="context, × trained length", xscale="log")
        axis.minorticks_off()
        axis.set_xticks(EXTENTS, [f"{extent}×" for extent in EXTENTS])
    axes[0].set(ylabel="loss of the same tokens, nats")
    axes[0].set_ylim(top=min(axes[0].get_ylim()[1], 2 * table["rows"]["teacher"]["1x"]["loss"]))
    axes[0].legend()
    figure.savefig(stem.with_suffix(".png"), dpi=110)


def main() -> None:
    """Train what is missing, score, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="HF directory of the teacher")
    parser.add_argument("--data", required=True, help="text to train on and to hold out from")
    parser.add_argument("--length", type=int, default=256, help="the teacher's trained context")
    parser.add_argument("--window", type=int, default=32, help="W of every variant")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="token budget of stage 1")
    parser.add_argument("--tokens2", type=int, default=500_000, help="token budget of stage 2")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="peak learning rate of stage 1")
    parser.add_argument("--learning-rate2", type=float, default=1e-3, help="peak learning rate of stage 2")
    parser.add_argument("--set", choices=SETS, default="variants", help="published variants, our choices, our start")
    parser.add_argument("--only", nargs="+", default=None, help="these of the set")
    parser.add_argument("--out", default="runs/variants", help="where the runs go")
    arguments = parser.parse_args()

    tokens = held_out_tokens(arguments)
    kept = Path(arguments.out) / "teacher_spans.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(span_losses(load_hf(arguments.teacher), tokens, arguments.length)))
    teacher = json.loads(kept.read_text())
    rows = {"teacher": summarize(teacher, teacher["1x"])}
    for name in arguments.only or SETS[arguments.set]:
        for when, spans in measure(arguments, name, tokens).items():
            rows[f"{name}, {when}"] = summarize(spans, teacher["1x"])
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "teacher", "data", "only")}
    scored = len(teacher["1x"]) * arguments.length
    write(arguments, {"settings": settings, "scored_tokens": scored, "rows": rows})


if __name__ == "__main__":
    main()
