"""Checkpoints of a stage: the parts that are not the teacher's, its optimizer, and what they belong to.

``STAGE/run.json`` says which settings, teacher and data the checkpoints belong to. ``STAGE/checkpoints/STEP`` are the
latest few, with optimizer state; ``STAGE/best/STEP`` is the one that validation found best, parameters only.
``STAGE/sums`` has the checksums of each: one that disk or network has damaged since is told, moved to
``STAGE/damaged``, and the one before it is used.

Orbax writes each beside its place and renames it, but does not bring all of it to the disk itself, and a power failure
may leave a name without its content. So a checkpoint counts from when its checksums are there, which is after all of it
is on the disk; before that, and while one is removed, they are an empty object (``UNFINISHED``). An older checkpoint is
removed after a newer one counts.
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lizard_jax import orbax_noise, sharding
from lizard_jax.atomic import sync, sync_tree, write_atomic
from lizard_jax.checksums import difference, sums
from lizard_jax.errors import UserError, disk_full
from lizard_jax.nn.params import LoraParam, NewParam

KEPT = {"checkpoints": 2, "best": 1}
"""Kinds of checkpoints, and how many of each stay."""
UNFINISHED = "{}\n"
"""Checksums of a checkpoint that is being saved or removed."""


def kept(trainable: Any) -> Any:
    """The nnx filter of what a checkpoint holds: the new modules, LoRA, and whatever else the stage trains."""
    return nnx.Any(NewParam, LoraParam, trainable)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their path; checkpoints are flat, so that they outlive container types."""
    return {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def fill(tree: Any, leaves: dict[str, Any]) -> Any:
    """The pytree with each leaf that ``leaves`` names replaced."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(sharding.path_name(path), leaf), tree)


class Checkpoints:
    """The checkpoints of one stage directory. Every method is called by all processes.

    Raises:
        UserError: from ``save`` and ``save_best``, when the disk is full; what was saved before is intact.
    """

    def __init__(self, stage_dir: Path) -> None:
        orbax_noise.quiet()
        self._dir = stage_dir
        self._latest = _manager(stage_dir / "checkpoints")
        self._best = _manager(stage_dir / "best")
        # The first process looks at the files for all.
        if jax.process_index() == 0:
            for kind in KEPT:
                _remove_unfinished(stage_dir, kind)
                _set_damaged_aside(stage_dir, kind)
                _thin(stage_dir, kind)
        multihost_utils.sync_global_devices("checkpoints were looked through")
        self._latest.reload()
        self._best.reload()

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return self._latest.latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint, None where there is none."""
        return self._best.latest_step()

    def best_objective(self) -> float:
        """What the best checkpoint was chosen by; inf where there is none, or one that an earlier version chose."""
        step = self.best_step()
        if step is None:
            return float("inf")
        saved = self._best.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))
        return saved["info"].get("objective", float("inf"))

    def save(self, step: int, params: Any, optimizer: Any) -> None:
        """Save parameters and optimizer state as the newest checkpoint; the step counts finished updates."""
        items = {"params": ocp.args.StandardSave(named(params)), "optimizer": ocp.args.StandardSave(named(optimizer))}
        self._save(self._latest, step, items)

    def save_best(self, step: int, params: Any, objective: float) -> None:
        """Save parameters as the best so far, in place of the best before."""
        items = {"params": ocp.args.StandardSave(named(params)), "info": ocp.args.JsonSave({"objective": objective})}
        self._save(self._best, step, items)

    def restore(self, params: Any, optimizer: Any, mesh: Mesh) -> tuple[Any, Any, int]:
        """The newest checkpoint in the structure, dtypes and (whatever it was saved on) mesh of these."""
        step = self._latest.latest_step()
        assert step is not None
        items = {
            "params": ocp.args.StandardRestore(_abstract(params, mesh)),
            "optimizer": ocp.args.StandardRestore(_abstract(optimizer, mesh)),
        }
        with orbax_noise.failing_quietly():
            got = self._latest.restore(step, args=ocp.args.Composite(**items))
        return fill(params, got["params"]), fill(optimizer, got["optimizer"]), step

    def close(self) -> None:
        """Let go of Orbax's threads."""
        self._latest.close()
        self._best.close()

    def _save(self, manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> None:
        if step in manager.all_steps():
            return
        # Asked first, because Orbax's other writes go on after one has failed.
        if shutil.disk_usage(manager.directory).free < bytes_needed(items.values()):
            raise full_disk(self._dir, self.latest_step())
        kind, first = Path(manager.directory).name, jax.process_index() == 0
        try:
            if first:
                _mark_unfinished(self._dir, kind, step)
            with orbax_noise.failing_quietly():
                manager.save(step, args=ocp.args.Composite(**items))
            if first:
                saved = self._dir / kind / str(step)
                sync_tree(saved)
                write_atomic(_sums_file(self._dir, kind, step), json.dumps(sums(saved), indent=1) + "\n")
        except Exception as error:
            _remove_partial(Path(manager.directory))
            if first:
                _remove(self._dir, kind, step)
            if disk_full(error):
                raise full_disk(self._dir, max(_steps(self._dir, "checkpoints"), default=None)) from None
            raise
        if first:
            _thin(self._dir, kind)
        multihost_utils.sync_global_devices("older checkpoints were removed")
        manager.reload()


def restore_params(stage_dir: Path, params: Any, which: str = "best") -> tuple[Any, int]:
    """The parameters of a stage's ``best`` or ``latest`` checkpoint, on the host, in the structure of ``params``.

    Only the leaves that ``params`` has are read. Returns them with the checkpoint's step.

    Raises:
        UserError: there is no checkpoint of that kind, or it holds other parameters than these.
    """
    directory = stage_dir / {"best": "best", "latest": "checkpoints"}[which]
    steps = _steps(stage_dir, directory.name)
    if not steps:
        raise UserError(f"{stage_dir} holds no {which} checkpoint; train that stage first")
    wanted = named(params)
    orbax_noise.quiet()
    step = max(steps)
    if (damage := _damage(stage_dir, directory.name, step)) is not None:
        raise UserError(f"the {which} checkpoint in {stage_dir} is damaged: {damage}; train that stage again")
    with orbax_noise.failing_quietly(), ocp.PyTreeCheckpointer() as reader:
        path = directory.resolve() / str(step) / "params"
        shapes = {name: tuple(leaf.shape) for name, leaf in reader.metadata(path).item_metadata.items()}
        wrong = [name for name, leaf in wanted.items() if shapes.get(name) != tuple(leaf.shape)]
        if wrong:
            names = f"{', '.join(wrong[:3])}{' …' * (len(wrong) > 3)}"
            raise UserError(
                f"{directory} does not hold {names} in the shape this model has; is it another model's run?"
            )
        got = reader.restore(
            path,
            ocp.args.PyTreeRestore(
                item={name: np.zeros(()) for name in wanted},
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted},
                partial_restore=True,
            ),
        )
    return fill(params, got), step


def has_checkpoint(stage_dir: Path, kinds: Iterable[str] = tuple(KEPT)) -> bool:
    """Whether a stage directory holds a whole checkpoint of one of these kinds."""
    return any(_steps(stage_dir, kind) for kind in kinds)


def _damage(stage_dir: Path, kind: str, step: int) -> str | None:
    """What is wrong with one of a stage's ``checkpoints`` or ``best`` by its checksums; None too where it has none."""
    # Checksums that are damaged themselves say nothing of the checkpoint.
    with contextlib.suppress(UserError):
        return difference(stage_dir / kind / str(step), read_json(_sums_file(stage_dir, kind, step)))
    return None


def _set_damaged_aside(stage_dir: Path, kind: str) -> None:
    """Moves damaged checkpoints out of the way and tells of them.

    Raises:
        UserError: there are checkpoints to go on from, and all of them are damaged.
    """
    looked = {step: _damage(stage_dir, kind, step) for step in sorted(_steps(stage_dir, kind))}
    found = {step: damage for step, damage in looked.items() if damage is not None}
    whole = [step for step, damage in looked.items() if damage is None]
    if found and kind == "checkpoints" and not whole:
        reasons = "; ".join(f"step {step}: {damage}" for step, damage in found.items())
        raise UserError(
            f"every checkpoint in {stage_dir} is damaged ({reasons}); name another --out, or remove {stage_dir} and "
            "begin again"
        )
    for step, damage in found.items():
        aside = stage_dir / "damaged" / f"{kind}-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(exist_ok=True)
        (stage_dir / kind / str(step)).replace(aside)
        _sums_file(stage_dir, kind, step).unlink(missing_ok=True)
        then = f"going on from step {whole[-1]}" if kind == "checkpoints" else "a better one is looked for from here on"
        name = "best checkpoint" if kind == "best" else "checkpoint"
        print(
            f"warning: the {name} of step {step} is damaged ({damage}) and now lies in {aside}; {then}",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def _sums_file(stage_dir: Path, kind: str, step: int) -> Path:
    return stage_dir / "sums" / f"{kind}-{step}.json"


def _mark_unfinished(stage_dir: Path, kind: str, step: int) -> None:
    file = _sums_file(stage_dir, kind, step)
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, UNFINISHED)


def _unfinished(stage_dir: Path, kind: str) -> set[int]:
    """Steps whose checkpoint was being saved or removed."""
    files = (stage_dir / "sums").glob(f"{kind}-*.json")
    return {int(file.stem.rpartition("-")[2]) for file in files if file.read_bytes() == UNFINISHED.encode()}


def _steps(stage_dir: Path, kind: str) -> set[int]:
    """Steps of the whole checkpoints of a kind."""
    directory = stage_dir / kind
    there = {int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()} if directory.is_dir() else set()
    return there - _unfinished(stage_dir, kind)


def _remove(stage_dir: Path, kind: str, step: int) -> None:
    """Remove a checkpoint that is marked unfinished, and then the mark."""
    directory = stage_dir / kind / str(step)
    shutil.rmtree(directory, ignore_errors=True)
    sync(directory.parent)
    if not directory.exists():
        _sums_file(stage_dir, kind, step).unlink(missing_ok=True)


def _remove_unfinished(stage_dir: Path, kind: str) -> None:
    for step in _unfinished(stage_dir, kind):
        _remove(stage_dir, kind, step)


def _thin(stage_dir: Path, kind: str) -> None:
    """Remove all but the newest few checkpoints of a kind."""
    for step in sorted(_steps(stage_dir, kind))[: -KEPT[kind]]:
        _mark_unfinished(stage_dir, kind, step)
        _remove(stage_dir, kind, step)


def _manager(directory: Path) -> ocp.CheckpointManager:
    # None is removed by Orbax, which would do it before the new one is on the disk.
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, cleanup_tmp_directories=True, create=True)
    return ocp.CheckpointManager(directory.resolve(), options=options)


def _abstract(tree: Any, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    sizes = dict(mesh.shape)

    def placed(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        spec = sharding.partition_spec(name, leaf.shape, sizes)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return {name: placed(name, leaf) for name, leaf in named(tree).items()}


def bytes_needed(items: Iterable[Any]) -> int:
    """Disk space that saving takes at most: the arrays, and room for Orbax's own files."""
    leaves = jax.tree.leaves([item.item for item in items])
    return sum(leaf.nbytes + 4096 for leaf in leaves if isinstance(leaf, jax.Array)) + (1 << 20)


def _remove_partial(directory: Path) -> None:
    for _ in range(10):
        for leftover in directory.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        time.sleep(0.1)  # a write still under way makes its folder again
        if not any(directory.glob("*orbax-checkpoint-tmp*")):
            return


# ------------------------------------------------------------------------------------------------- plain files


def full_disk(directory: Path, step: int | None) -> UserError:
    """What to tell the user when saving failed for want of space."""
    before = "no checkpoint had been saved" if step is None else f"the checkpoint of step {step} is intact"
    return UserError(f"no space left to save in {directory}; {before}; free some space and run the same command again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it is missing, or not JSON.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; is {path.parent} the stage directory of a run?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def changes(old: dict[str, Any], new: dict[str, Any], ignore: tuple[str, ...]) -> list[str]:
    """The settings that differ, each as ``name: old -> new``; names that start as one of ``ignore`` may differ."""
    return [
        f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and not name.startswith(ignore)
    ]
