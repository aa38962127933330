"""What a finished stage leaves: a table on stdout, ``result.json`` and ``curves.png`` in its directory."""

import importlib.metadata
import io
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lizard_jax.atomic import finite, write_atomic
from lizard_jax.config import RunConfig, to_dict
from lizard_jax.train.stages import objective

PACKAGES = ("lizard-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, those that are installed."""
    out = {"python": platform.python_version()}
    for package in packages:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def summarize(config: RunConfig, history: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a finished run from its metrics.

    Returns:
        ``before`` and ``after`` (held-out loss, perplexity, layer_mse; after is the best checkpoint's, from
        ``best_step``, by ``stages.objective``), ``teacher`` where it was measured, ``steps``, those ``skipped``,
        ``tokens``, ``seconds`` of stepping and the median ``tokens_per_second``.
    """
    validations = {entry["step"]: entry["validation"] for entry in history if "validation" in entry}
    steps = [entry for entry in history if "loss" in entry]
    best_step = min((step for step in validations if step > 0), key=lambda step: objective(config, validations[step]))
    names = ("loss", "perplexity", "layer_mse")

    def pick(numbers: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        return {name: numbers[prefix + name] for name in names if prefix + name in numbers}

    out: dict[str, Any] = {"before": pick(validations[0]), "after": pick(validations[best_step])}
    if "teacher_loss" in validations[0]:
        out["teacher"] = pick(validations[0], "teacher_")
    return out | {
        "best_step": best_step,
        "held_out_tokens": validations[0]["tokens"],
        "steps": steps[-1]["step"],
        "skipped": sum("skipped" in entry for entry in history),
        "tokens": steps[-1]["tokens"],
        "seconds": sum(entry["seconds"] for entry in steps),
        "tokens_per_second": float(np.median([entry["tokens_per_second"] for entry in steps])),
        "config": to_dict(config),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }


def table(config: RunConfig, result: dict[str, Any]) -> Table:
    """Teacher, before and after: held-out loss, perplexity and the MSE of each layer's head outputs."""
    columns = [name for name in ("teacher", "before", "after") if name in result]
    out = Table(title=f"{config.recipe}, stage {config.stage}: {result['held_out_tokens']:,} held-out tokens")
    out.add_column("")
    for name in columns:
        out.add_column(name, justify="right")

    def row(title: str, name: str, form: str) -> None:
        out.add_row(title, *(format(result[column][name], form) for column in columns))

    row("loss, nats a token", "loss", ".4f")
    row("perplexity", "perplexity", ".3f")
    before, after = result["before"].get("layer_mse", []), result["after"].get("layer_mse", [])
    for layer, (first, last) in enumerate(zip(before, after, strict=True)):
        cells = {"teacher": "0", "before": f"{first:.3e}", "after": f"{last:.3e}"}
        out.add_row(f"layer {layer}, MSE", *(cells[name] for name in columns))
    return out


def curves(history: list[dict[str, Any]], stage: int) -> bytes:
    """A PNG of training loss, held-out loss, learning rate and layer MSE over the steps."""
    steps = [entry for entry in history if "loss" in entry]
    validations = [(entry["step"], entry["validation"]) for entry in history if "validation" in entry]
    at = [entry["step"] for entry in steps]
    figure = Figure(figsize=(11, 7), layout="constrained")
    ((loss, held), (rate, layers)) = figure.subplots(2, 2)

    loss.plot(at, [entry["loss"] for entry in steps], linewidth=0.8)
    loss.set(title="training loss: " + ("mean layer MSE" if stage == 1 else "nats a token"), xlabel="step")
    if stage == 1:
        loss.set_yscale("log")
    held.plot([step for step, _ in validations], [v["loss"] for _, v in validations], marker="o", label="student")
    if validations and "teacher_loss" in validations[0][1]:
        held.axhline(validations[0][1]["teacher_loss"], linestyle="--", color="gray", label="teacher")
    held.set(title="held-out loss, nats a token", xlabel="step")
    held.legend()
    rate.plot(at, [entry["learning_rate"] for entry in steps])
    rate.set(title="learning rate", xlabel="step")
    measured = [(step, v["layer_mse"]) for step, v in validations if "layer_mse" in v]
    for layer in range(len(measured[0][1]) if measured else 0):
        layers.plot([step for step, _ in measured], [mse[layer] for _, mse in measured], label=str(layer))
    if measured:
        layers.set(title="held-out MSE of head outputs, by layer", xlabel="step", yscale="log")
        if len(measured[0][1]) <= 16:
            layers.legend(ncols=4, fontsize="small")
    else:
        layers.plot(at, [entry["grad_norm"] for entry in steps])
        layers.set(title="gradient norm", xlabel="step", yscale="log")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def write(config: RunConfig, history: list[dict[str, Any]], stage_dir: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """Write ``result.json`` and ``curves.png`` whole, and return the result."""
    result = summarize(config, history) | extra
    write_atomic(stage_dir / "curves.png", curves(history, config.stage))
    write_atomic(stage_dir / "result.json", json.dumps(finite(result), indent=2, allow_nan=False) + "\n")
    return result


def show(config: RunConfig, result: dict[str, Any], stage_dir: Path) -> None:
    """Print the table and where everything is."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(config, result))
    console.print(
        f"{result['tokens']:,} tokens in {result['seconds']:.0f} s, {result['tokens_per_second']:,.0f} tokens/s; "
        f"best at step {result['best_step']} of {result['steps']}"
    )
    console.print(f"result.json, curves.png, metrics.jsonl, TensorBoard events and checkpoints are in {stage_dir}")
