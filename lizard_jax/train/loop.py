"""The training loop: steps, validations, checkpoints and signals, the same for every stage.

Metrics are read one step behind, so that the host never waits for the step it has just sent off. A step whose loss or
gradient is not finite changes nothing (``step.py``), is told and counted; several in a row end the run.
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lizard_jax import sharding
from lizard_jax.config import RunConfig, to_dict
from lizard_jax.errors import UserError, disk_full
from lizard_jax.models.flops import forward_flops
from lizard_jax.nn.finite import not_finite
from lizard_jax.train import stages
from lizard_jax.train.checkpoint import Checkpoints, fill, full_disk, kept, named
from lizard_jax.train.log import MetricsLog, ProgressLine
from lizard_jax.train.optim import Optimizer
from lizard_jax.train.step import TrainState, eval_step, place, train_step
from lizard_jax.train.watch import Profile, wandb_run
from pallas_kernels import chips

VALIDATIONS = 10
PATIENCE = 3
"""Steps in a row whose loss or gradient may be not finite before a run ends; each is skipped."""
AGREE_EVERY = 10
"""Steps between the moments when several hosts ask each other whether one was told to stop."""


class Batches(Protocol):
    """What the loop needs of ``data.Loader``: a batch as a function of the step alone, and a held-out set."""

    def batch(self, step: int) -> Any: ...

    def held_out(self) -> Sequence[Any]: ...


class Stopped(Exception):
    """A signal ended the run; its checkpoint is saved."""

    def __init__(self, number: int, step: int, total: int) -> None:
        self.number = number
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} at step {step} of {total}; run the same command again to go on")


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the run: ``steps``, or as many as the token budget fills."""
    return config.steps or max(1, config.optim.tokens // (config.data.batch_size * config.data.sequence_length))


class Trainer:
    """One stage's run over one mesh: ``Trainer(config, model, batches, stage_dir, mesh).run()``.

    A ``stage_dir`` that holds a checkpoint is resumed, and its end is the undisturbed run's, bit for bit on CPU.
    """

    def __init__(self, config: RunConfig, model: nnx.Module, batches: Batches, stage_dir: Path, mesh: Mesh) -> None:
        self.config, self.batches, self.stage_dir, self.mesh = config, batches, stage_dir, mesh
        self.total = total_steps(config)
        self.validate_every = config.validate_every or max(1, math.ceil(self.total / VALIDATIONS))
        self.save_every = config.save_every or self.validate_every
        self.checkpoints = Checkpoints(stage_dir)
        optimizer = Optimizer(config.optim, self.total)
        self.state = place(config, model, optimizer, mesh)
        self.start = 0
        if self.checkpoints.latest_step() is not None:
            self._resume()
        self._train: Any = train_step(config, optimizer, self.state, mesh)
        self._compiled: dict[str, float] = {}
        self._peak = _peak(config, model, mesh)
        self._evaluate = eval_step(config, self.state, mesh)
        self._writes = jax.process_index() == 0
        page = wandb_run(config.wandb, stage_dir, to_dict(config)) if self._writes else None
        self.log = MetricsLog(stage_dir, self.start, self._writes, page)
        self._profile = Profile(stage_dir, self.start, config.profile if self._writes else 0)
        self._best = self.checkpoints.best_objective()
        self._skipped = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every entry of ``metrics.jsonl``."""
        return self.log.history

    def run(self) -> TrainState:
        """Train to the end.

        Raises:
            Stopped: SIGINT, SIGTERM or SIGHUP came; a checkpoint is saved.
            UserError: loss or gradient stay not finite, or the disk is full; earlier checkpoints are intact.
        """
        try:
            with _signals() as signals, ProgressLine(self.config.stage, self.start, self.total, self._writes) as line:
                self._line = line
                self._steps(signals)
            self.log.flush()
        except OSError as error:
            if disk_full(error):
                raise full_disk(self.stage_dir, self.checkpoints.latest_step()) from None
            raise
        finally:
            self._profile.close()
            self.log.close()
            self.checkpoints.close()
        return self.state

    def _steps(self, signals: list[int]) -> None:
        state = self.state
        if self.start == self.total:
            self._line.say(f"{self.stage_dir} is complete at step {self.total}")
        elif self.start:
            self._line.say(f"resuming {self.stage_dir} at step {self.start} of {self.total}")
        elif not any(entry["step"] == 0 for entry in self.history):
            self._validate(0)
        pending: tuple[int, dict[str, jax.Array], float] | None = None
        self._clock = time.monotonic()
        step = None
        for index in range(self.start, self.total):
            done = index + 1
            asked = time.monotonic()
            batch = self._placed(self.batches.batch(index))
            waited = time.monotonic() - asked
            step = step or self._compile(batch)
            self._profile.begin(index)
            state.trainable, state.optimizer, metrics = step(state.trainable, state.optimizer, state.frozen, batch)
            self._profile.end(index, metrics)
            if pending is not None:
                self._record(*pending)
            pending = (done, metrics, waited)
            stop = _agreed(signals, done)
            last = done == self.total
            validates = last or done % self.validate_every == 0
            saves = last or done % self.save_every == 0 or stop
            if not (validates or saves):
                continue
            self._record(*pending)
            pending = None
            if validates:
                self._validate(done)
            if saves:
                self._save(done)
            if stop and not last:
                raise Stopped(stop, done, self.total)
            self._clock = time.monotonic()

    def _compile(self, batch: Any) -> Any:
        """The compiled step; how long it took goes with the first step's entry."""
        began = time.monotonic()
        lowered = self._train.lower(self.state.trainable, self.state.optimizer, self.state.frozen, batch)
        traced = time.monotonic()
        compiled = lowered.compile()
        self._compiled = {"trace_seconds": traced - began, "compile_seconds": time.monotonic() - traced}
        return compiled

    def _placed(self, batch: Any) -> Any:
        return sharding.put_batch(batch, self.mesh)

    def _record(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        """Read a step's metrics and write them down with the seconds that it took and that it waited for its batch; one
        that was skipped leaves no numbers.
        """
        values = {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        tokens = self.config.data.batch_size * self.config.data.sequence_length
        entry: dict[str, Any] = {"step": step, "tokens": step * tokens, "seconds": seconds, "input_seconds": waited}
        entry |= self._compiled
        self._compiled = {}
        if (memory := self.mesh.local_devices[0].memory_stats()) is not None:
            entry["memory_bytes"] = memory.get("peak_bytes_in_use", 0)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            what = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            self._skipped += 1
            if self._skipped == min(PATIENCE, self.total):
                self._diverged(step, what)
            self._line.say(f"warning: step {step} is skipped: {what}")
            self.log.write(entry | {"skipped": True})
            return
        self._skipped = 0
        entry |= values | {"tokens_per_second": tokens / max(seconds, 1e-9)}
        if self._peak is not None:
            entry["teacher_mfu"] = self._peak / max(seconds, 1e-9)
        self.log.write(entry)
        pace = self._pace()
        self._line.step(step, values["loss"], tokens / max(pace, 1e-9), (self.total - step) * pace)

    def _pace(self) -> float:
        """Seconds a step, by the median of the last twenty, which a compile or a pause does not move."""
        recent = [entry["seconds"] for entry in self.history[-24:] if "seconds" in entry]
        return float(np.median(recent[-20:]))

    def _validate(self, step: int) -> None:
        began = time.monotonic()
        sums: dict[str, Any] = {}
        for batch in self.batches.held_out():
            part = jax.device_get(self._evaluate(self.state.trainable, self.state.frozen, self._placed(batch)))
            sums = {name: np.asarray(value, np.float64) + sums.get(name, 0.0) for name, value in part.items()}
        numbers = stages.finish(sums)
        if not math.isfinite(numbers["loss"]):
            self._diverged(step, f"held-out loss {numbers['loss']}")
        self.log.write({"step": step, "validation": numbers | {"seconds": time.monotonic() - began}})
        self._line.say(f"stage {self.config.stage}  {step}/{self.total}  held-out {_summary(numbers)}")
        judged = stages.objective(self.config, numbers)
        if step > 0 and judged < self._best:
            self._best = judged
            self.checkpoints.save_best(step, self._kept(), self._best)

    def _save(self, step: int) -> None:
        # The log first: a checkpoint promises that every line up to its step is on disk.
        self.log.flush()
        self.checkpoints.save(step, self._kept(), self.state.optimizer)

    def _kept(self) -> nnx.State:
        """What checkpoints hold of the parameters."""
        both = nnx.merge_state(self.state.trainable, self.state.frozen)
        return nnx.filter_state(both, kept(stages.trainable(self.config)))

    def _resume(self) -> None:
        params, self.state.optimizer, self.start = self.checkpoints.restore(
            self._kept(), self.state.optimizer, self.mesh
        )
        leaves = named(params)
        self.state.trainable = fill(self.state.trainable, leaves)
        self.state.frozen = fill(self.state.frozen, leaves)

    def _diverged(self, step: int, what: str) -> None:
        if (path := not_finite(self.state.frozen)) is not None:
            raise UserError(
                f"stage {self.config.stage} cannot go on: {what}, for the teacher's {path} holds NaN or infinity; its "
                "weights are damaged"
            )
        if step == 0:
            cause = not_finite(self.state.trainable)
            raise UserError(
                f"stage {self.config.stage} cannot begin: {what} before any step; "
                + (f"{cause} starts as NaN or infinity" if cause else "its weights are finite; try --dtype float32")
            )
        saved = self.checkpoints.latest_step()
        kept_at = "no checkpoint was saved before" if saved is None else f"the checkpoint of step {saved} is kept"
        raise UserError(
            f"stage {self.config.stage} diverged at step {step}: {what}; {kept_at} in {self.stage_dir}; "
            "try a lower --learning-rate in a new --out"
        )


def _peak(config: RunConfig, model: Any, mesh: Mesh) -> float | None:
    """Seconds that the teacher's forward pass of a batch takes at the devices' peak of bf16 matmuls; None where that is
    not known. Over a step's seconds it is the step's model FLOP utilization, in the teacher's forward FLOPs.
    """
    chip = chips.here(mesh.devices.flat[0])
    if chip is None:
        return None
    tokens = config.data.batch_size * config.data.sequence_length
    return forward_flops(model.config, tokens) / (chip.flops * mesh.devices.size)


def _summary(numbers: dict[str, Any]) -> str:
    text = f"loss {numbers['loss']:.4f}"
    if "teacher_loss" in numbers:
        text += f" (teacher {numbers['teacher_loss']:.4f})"
    if "kl" in numbers:
        text += f"  KL {numbers['kl']:.4f}"
    if numbers.get("layer_error"):
        text += f"  layer error {np.mean(numbers['layer_error']):.4f}"
    return text


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that end a run into a list; the second one of a kind acts as usual."""
    received: list[int] = []
    usual: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, usual[number])

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        usual[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def _agreed(received: list[int], step: int) -> int:
    """The signal to stop for, 0 for none; all hosts answer alike."""
    mine = received[0] if received else 0
    if jax.process_count() == 1:
        return mine
    if step % AGREE_EVERY:
        return 0
    return int(np.max(multihost_utils.process_allgather(np.asarray(mine, np.int32))))
