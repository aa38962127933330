"""One stage from its settings to its report: what it starts from, what it belongs to, and how it is loaded again."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lizard_jax import sharding
from lizard_jax.atomic import sync_tree, write_atomic
from lizard_jax.cli import flatten, from_dict
from lizard_jax.config import ModelConfig, RunConfig, to_dict
from lizard_jax.convert.files import carry, read_json, teacher_dir
from lizard_jax.convert.hf_config import model_config
from lizard_jax.convert.load import load_hf
from lizard_jax.convert.save import save_hf
from lizard_jax.data.loader import Loader
from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import teacher_config
from lizard_jax.errors import UserError
from lizard_jax.lora import add_lora
from lizard_jax.models import Llama
from lizard_jax.models import build as build_model
from lizard_jax.nn.params import NewParam
from lizard_jax.nn.rope import segment_positions
from lizard_jax.train import checkpoint, report, stages, start
from lizard_jax.train.lock import alone
from lizard_jax.train.loop import Trainer
from lizard_jax.train.settle import begun, continued, settled, stage_dir
from lizard_jax.train.teacher import find_teacher, fingerprint, whereabouts
from lizard_jax.train.watch import check_wandb
from pallas_kernels import partition

# A resumed run may differ in these: where it lies, on what and in how many parts a step, how often it saves, and paths
# that fingerprints stand for.
MAY_CHANGE = (
    "out", "mesh.", "validate_every", "save_every", "profile", "wandb", "teacher", "data.path", "data.date",
    "data.accumulate",
)  # fmt: skip

LEAST_BEYOND = 0.1
"""Share of positions beyond the window in their document, below which a run warns."""


def check(config: RunConfig) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UserError: a value out of range, a sequence shorter than the window, or a run directory that cannot be written.
    """
    optim, data = config.optim, config.data
    for name, value, good in (
        ("learning rate", optim.learning_rate, 0 < optim.learning_rate <= 10),
        ("tokens", optim.tokens, 0 < optim.tokens < 2**53),
        ("warmup", optim.warmup, 0 <= optim.warmup <= 1),
        ("final", optim.final, 0 <= optim.final <= 1),
        ("clip", optim.clip, optim.clip > 0),
        ("beta1", optim.beta1, 0 <= optim.beta1 < 1),
        ("beta2", optim.beta2, 0 <= optim.beta2 < 1),
        ("weight decay", optim.weight_decay, 0 <= optim.weight_decay <= 10),
        ("kl", config.kl, 0 <= config.kl <= 1),
        ("steps", config.steps, 0 <= config.steps < 2**31),
        ("seed", config.seed, 0 <= config.seed < 2**32),
        ("data-seed", data.seed, 0 <= data.seed < 2**32),
        ("LoRA rank", config.lora.rank, 1 <= config.lora.rank <= 2**14),
        ("LoRA alpha", config.lora.alpha, 0 < config.lora.alpha <= 1e6),
        ("validate-every", config.validate_every, config.validate_every >= 0),
        ("save-every", config.save_every, config.save_every >= 0),
        ("profile", config.profile, 0 <= config.profile <= 1000),
        ("batch size", data.batch_size, 0 < data.batch_size <= 2**20),
        ("accumulate", data.accumulate, 0 < data.accumulate <= 2**20),
        ("sequence length", data.sequence_length, 0 < data.sequence_length <= 2**24),
    ):
        if not good:
            raise UserError(f"{name} {value} is out of range; see train.py --help")
    try:
        date.fromisoformat(data.date or "2000-01-01")
    except ValueError:
        raise UserError(f"date {data.date!r} is no day as 2026-11-25") from None
    if config.stage > 0 and data.sequence_length < config.attention.window:
        raise UserError(
            f"sequence length {data.sequence_length} is shorter than the window {config.attention.window}; "
            "give a longer --sequence-length or a smaller --window"
        )
    if config.stage == 1 and not config.attention.adds_modules:
        raise UserError(
            f"stage 1 has nothing to train: memory={config.attention.memory} with meta={config.attention.meta} adds no "
            "modules; go on with --stage=2 and the same settings"
        )
    check_wandb(config.wandb)
    if "://" in config.out:
        raise UserError(
            f"--out {config.out} is no folder; runs are written to a file system: mount the bucket, and name its folder"
        )
    path = stage_dir(config).absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write the run to {stage_dir(config)}: {path} is not a directory that can be written")


def start_model(config: RunConfig, source: Path, mesh: Mesh | None = None) -> Llama:
    """The model a stage starts from: fresh (0), the teacher with new modules (1), or with stage 1's and LoRA (2).

    With a mesh, the teacher's weights go to their devices as they are read.
    """
    if config.stage == 0:
        return build_model(_shape_of(config, source), dtype=config.dtype, rngs=nnx.Rngs(config.seed))
    model = load_hf(source, attention=config.attention, dtype=config.dtype, seed=config.seed, mesh=mesh)
    if config.stage == 2:
        if config.attention.adds_modules:
            params, _ = checkpoint.restore_params(stage_dir(config, 1), nnx.state(model, NewParam))
            nnx.update(model, params)
        if not config.full:
            add_lora(model, config.lora, nnx.Rngs(config.seed))
    return widened(model, config)


def widened(model: Llama, config: RunConfig) -> Llama:
    """The model itself, or in float64 throughout where the run is: new parameters and LoRA too."""
    if config.dtype == "float64":
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(model, nnx.Param)))
    return model


def load_run(
    directory: str | Path, which: str = "best", *, teacher: str | Path | None = None, mesh: Mesh | None = None
) -> tuple[Llama, Path]:
    """The model of a stage directory's ``best`` or ``latest`` checkpoint, and the teacher's directory.

    Args:
        teacher: where the teacher lies now, if not where it was.
        mesh: spreads every parameter over these devices.

    Raises:
        UserError: not a stage directory, no such checkpoint, or the teacher it belongs to is gone or has changed.
    """
    path = Path(directory).expanduser()
    record = checkpoint.read_json(path / "run.json")
    config = from_dict(RunConfig, record["config"])
    source = find_teacher(path, record, None if teacher is None else str(teacher))
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if config.stage == 0:
        shape = from_dict(ModelConfig, record["model"])
        model = build_model(shape, dtype=config.dtype, rngs=nnx.Rngs(config.seed))
    else:
        model = load_hf(source, attention=config.attention, dtype=config.dtype, seed=config.seed, mesh=mesh)
        if config.stage == 2 and not config.full:
            add_lora(model, config.lora, nnx.Rngs(config.seed))
    widened(model, config)
    trained = nnx.state(model, checkpoint.kept(stages.trainable(config)))
    params, _ = checkpoint.restore_params(path, trained, which)
    nnx.update(model, jax.tree.map(jnp.asarray, params))
    if mesh is not None:
        state = nnx.state(model)
        nnx.update(model, sharding.put(state, sharding.state_shardings(state, mesh)))
    return model, source


def run(config: RunConfig, given: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Run one stage to its end and report it; resume it where its directory holds a checkpoint.

    Args:
        given: dotted names of the settings that the command line gave.

    Returns:
        What ``result.json`` holds.

    Raises:
        UserError: bad input, a changed setting on resume, a full disk, or a diverged run.
        Stopped: a signal came; a checkpoint is saved.
    """
    sharding.start_distributed()
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    config = continued(config, given)
    check(config)
    mesh = sharding.make_mesh(config.mesh)
    path = stage_dir(config)
    source = teacher_dir(config.teacher)
    sharding.check_split(config.data.sequence_length, _shape_of(config, source).kv_heads, mesh)
    config = settled(config, given, begun(path), source, mesh)
    record = _record(config, source)
    if config.stage == 2 and config.attention.adds_modules:
        first = checkpoint.read_json(stage_dir(config, 1) / "run.json")
        if first["teacher"]["fingerprint"] != record["teacher"]["fingerprint"]:
            raise UserError(
                f"the teacher in {source} is not the one stage 1 in {stage_dir(config, 1)} was trained with"
            )
    _check_same(path, record)
    tokenizer = load_tokenizer(source)
    # Every process reads the global batch and keeps its shards: right on any mesh, also where tensor crosses hosts.
    loader = Loader(config.data, tokenizer, vocab_size=record["model"]["vocab_size"])
    record["data"] = {"fingerprint": loader.fingerprint, "tokens": loader.num_tokens}
    _check_same(path, record)
    if not any(batch.loss_mask.any() for batch in loader.held_out()):
        raise UserError(
            f"no token that {config.data.path} keeps for validation is scored, so nothing could be measured; keep more "
            "documents (--held-out), score more of them (--held-out-tokens), or leave out --answer-only"
        )
    if jax.process_index() == 0:
        for note in filter(None, (half_done(config), short_text(config, loader))):
            print(note, file=sys.stderr, flush=True)
    model = start_model(config, source, mesh)
    if config.stage == 1 and start.measures(config.attention) and not checkpoint.has_checkpoint(path):
        found = measured(model, loader, mesh)
        if jax.process_index() == 0:
            print(found.summary(), file=sys.stderr, flush=True)

    path.mkdir(parents=True, exist_ok=True)
    with alone(path) if jax.process_index() == 0 else nullcontext():
        if jax.process_index() == 0:
            write_atomic(path / "run.json", json.dumps(record, indent=2) + "\n")
        trainer = Trainer(config, model, loader, path, mesh)
        del model
        state = trainer.run()
    if jax.process_index() != 0:
        return {}
    if config.stage == 0:
        _export(config, source, path)
    sizes = {"trained": _size(state.trainable), "total": _size(state.trainable) + _size(state.frozen)}
    extra = {"parameters": sizes, "teacher_path": str(source), "data": record["data"]}
    result = report.write(config, trainer.history, path, extra)
    report.show(config, result, path)
    return result


def half_done(config: RunConfig) -> str | None:
    """A note where stage 2 takes over from a stage 1 that did not come to its end."""
    first = stage_dir(config, 1)
    if config.stage != 2 or not config.attention.adds_modules or (first / "result.json").is_file():
        return None
    return (
        f"warning: stage 1 in {first} did not come to its end, and its best parameters so far are taken; to finish it, "
        "repeat its command, and give stage 2 a new run"
    )


def short_text(config: RunConfig, loader: Loader) -> str | None:
    """A note where the text hardly trains a memory: less than a tenth of its positions have one to read."""
    attention = config.attention
    if config.stage == 0 or attention.memory == "none":
        return None
    segments = jnp.asarray(loader.batch(0).segment_ids)
    # With as many pairs kept as have left the window, the memory is empty still.
    beyond = attention.window + attention.kept if attention.memory == "evicted" else 0
    share = float(((segment_positions(segments) >= beyond) & (segments != 0)).mean())
    if share >= LEAST_BEYOND:
        return None
    cure = "--no-segment-mask, which reads on across documents, " if config.data.segment_mask else ""
    exact = f"{attention.kept} kept pairs and a window" if attention.kept else "a window"
    return (
        f"warning: {share:.1%} of the positions lie more than {exact} of {attention.window} behind the start of their "
        f"document, so there is little to train a memory on; use {cure}longer documents or a longer --sequence-length"
    )


def measured(model: Llama, loader: Loader, mesh: Mesh) -> start.Start:
    """The model's gates and β, in place, where the first of its training text says (``train/start.py``)."""
    batches = [sharding.put_batch(batch, mesh) for batch in loader.first(start.TOKENS)]
    with partition.over(sharding.kernel_partition(mesh)):
        return start.measure_start(model, batches)


def _shape_of(config: RunConfig, source: Path) -> ModelConfig:
    if config.stage == 0 and config.teacher == "embedded":
        return teacher_config()
    shape = model_config(read_json(source / "config.json"))
    return dataclasses.replace(shape, attention=None if config.stage == 0 else config.attention)


def _record(config: RunConfig, source: Path) -> dict[str, Any]:
    """What ``run.json`` says a run belongs to, data aside. Stage 0 takes only shape and tokenizer from its teacher."""
    shape = _shape_of(config, source)
    mark = hashlib.sha256(repr(shape).encode()).hexdigest() if config.stage == 0 else fingerprint(source)
    return {
        "config": to_dict(config),
        "teacher": whereabouts(config.teacher, stage_dir(config)) | {"fingerprint": mark},
        "model": to_dict(shape),
        "versions": report.versions(),
    }


def _check_same(path: Path, record: dict[str, Any]) -> None:
    """Refuse to resume a run of other settings, another teacher or other data."""
    if not checkpoint.has_checkpoint(path):
        return
    old = checkpoint.read_json(path / "run.json")
    if old["config"]["stage"] == 2:
        old["config"].setdefault("kl", 0.0)  # a run from before there was one learned by next-token loss alone
    new_config = from_dict(RunConfig, record["config"])
    old_config = from_dict(RunConfig, old["config"])
    changed = checkpoint.changes(flatten(old_config), flatten(new_config), MAY_CHANGE)
    for name in ("teacher", "data"):
        if name in record and record[name]["fingerprint"] != old.get(name, {}).get("fingerprint"):
            changed.append(f"{name}: not the one this run was trained with")
    if changed:
        raise UserError(
            f"{path} holds a run of other settings ({'; '.join(changed)}); "
            "repeat those it was started with, or name another --out"
        )


def _export(config: RunConfig, source: Path, path: Path) -> None:
    """Stage 0's best parameters as an HF directory with the tokenizer, ``hf`` in the stage directory."""
    target, staging = path / "hf", path / ".hf"
    shutil.rmtree(staging, ignore_errors=True)
    model, _ = load_run(path)
    save_hf(model, staging, source=None)
    carry(source, staging)
    sync_tree(staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.replace(target)


def _size(state: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))
