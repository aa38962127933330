"""The loop: what it writes, and that no way of stopping it changes where it ends."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError
from lizard_jax.models.flops import forward_flops
from lizard_jax.train import checkpoint, stages
from lizard_jax.train.checkpoint import Checkpoints, restore_params
from lizard_jax.train.lock import alone
from lizard_jax.train.log import read_metrics
from lizard_jax.train.loop import Stopped, Trainer, total_steps
from pallas_kernels import chips
from tests.train.tiny import MODEL, RandomBatches, make_model, mesh_of, run_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = run_config(1, steps=8, validate_every=2)


def _trainer(directory, batches=None, config=CONFIG):
    return Trainer(config, make_model(config), batches or RandomBatches(config.data), directory, mesh_of())


def _saved(directory, step):
    """All arrays of a checkpoint, parameters and optimizer, on the host."""
    out = {}
    with ocp.PyTreeCheckpointer() as reader:
        for part in ("params", "optimizer"):
            place = directory / "checkpoints" / str(step) / part
            names = reader.metadata(place).item_metadata
            how = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            out |= reader.restore(place, ocp.args.PyTreeRestore(restore_args=how))
    return out


def _same_run(directory, undisturbed):
    """Bitwise the same parameters, optimizer state and recorded losses."""
    mine, theirs = _saved(directory, 8), _saved(undisturbed, 8)
    assert mine.keys() == theirs.keys()
    assert len(mine) > 20
    for name, value in mine.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    numbers = ("step", "loss", "layer_mse", "learning_rate", "grad_norm")
    lines = [
        [
            {name: line.get(name, line.get("validation", {}).get(name)) for name in numbers}
            for line in read_metrics(file, 8)
        ]
        for file in (directory / "metrics.jsonl", undisturbed / "metrics.jsonl")
    ]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("undisturbed")
    _trainer(directory).run()
    return directory


def test_what_a_run_writes(undisturbed):
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert {"learning_rate", "grad_norm", "tokens_per_second", "layer_mse", "tokens"} <= steps[0].keys()
    assert steps[-1]["loss"] < steps[0]["loss"]
    compiled = {"trace_seconds", "compile_seconds"}
    assert [compiled <= line.keys() for line in steps] == [True] + 7 * [False]
    assert 0 < steps[0]["trace_seconds"] + steps[0]["compile_seconds"] <= steps[0]["seconds"]
    assert "teacher_mfu" not in steps[0]  # a CPU's peak is not known
    validations = [line for line in lines if "validation" in line]
    assert [line["step"] for line in validations] == [0, 2, 4, 6, 8]
    assert len(validations[0]["validation"]["layer_mse"]) == 2
    assert sorted(int(path.name) for path in (undisturbed / "checkpoints").iterdir()) == [6, 8]
    best = min(validations[1:], key=lambda line: line["validation"]["kl"])
    checkpoints = Checkpoints(undisturbed)
    assert (checkpoints.best_step(), checkpoints.best_objective()) == (best["step"], best["validation"]["kl"])
    checkpoints.close()
    assert next(undisturbed.glob("events.out.tfevents.*")).stat().st_size > 500


def test_a_known_chip_tells_how_much_of_its_peak_is_used(tmp_path, monkeypatch):
    """As if this device were a chip of 1 GFLOP/s: the teacher's forward pass of a batch over the step's time."""
    slow = dataclasses.replace(chips.CHIPS["h100"], flops=1e9)
    monkeypatch.setattr(chips, "here", lambda device: slow)
    config = run_config(1, steps=2)
    Trainer(config, make_model(config), RandomBatches(config.data), tmp_path, mesh_of()).run()
    last = read_metrics(tmp_path / "metrics.jsonl", 2)[-2]
    expected = forward_flops(MODEL, 8 * 32) / (1e9 * last["seconds"])
    assert last["teacher_mfu"] == pytest.approx(expected)


def test_a_checkpoint_holds_no_teacher(undisturbed):
    names = _saved(undisturbed, 8)
    assert any("mixer/phi_q" in name for name in names)
    assert not any("proj/kernel" in name or "embed" in name for name in names)


def test_killed_and_resumed_is_bitwise_the_undisturbed_run(undisturbed, tmp_path):
    worker = [sys.executable, "-W", "error", "-m", "tests.train.worker", str(tmp_path)]
    with subprocess.Popen([*worker, "0.5"], cwd=ROOT, stderr=subprocess.DEVNULL) as slow:
        limit = time.monotonic() + 240
        while not (tmp_path / "checkpoints" / "4").exists() and slow.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(0.6)  # into a step that no checkpoint has
        slow.send_signal(signal.SIGKILL)
    assert slow.returncode == -signal.SIGKILL
    assert not (tmp_path / "checkpoints" / "8").exists()
    subprocess.run([*worker, "0"], cwd=ROOT, check=True, capture_output=True, timeout=240)
    _same_run(tmp_path, undisturbed)


def test_a_signal_saves_and_tells_how_to_go_on(undisturbed, tmp_path):
    class Signalled(RandomBatches):
        def batch(self, step):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    with pytest.raises(Stopped, match="SIGTERM at step 3 of 8; run the same command again"):
        _trainer(tmp_path, Signalled(CONFIG.data)).run()
    assert (tmp_path / "checkpoints" / "3").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # A line that a kill cut short is dropped.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    _trainer(tmp_path).run()
    _same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(("bad", "token"), [("loss", -1), ("gradient", -2)])
def test_a_step_that_is_not_finite_is_skipped_and_several_stop_the_run(tmp_path, bad, token, monkeypatch, capsys):
    usual = stages.loss_and_grads

    def poisoned(config, model, batch):
        grads, metrics = usual(config, model, batch)
        first = batch.inputs[0, 0]
        loss = jnp.where(first == -1, jnp.float32(jnp.nan), metrics["loss"])
        factor = jnp.where(first == -2, jnp.float32(jnp.inf), jnp.float32(1))
        return jax.tree.map(lambda g: g * factor, grads), metrics | {"loss": loss}

    monkeypatch.setattr(stages, "loss_and_grads", poisoned)

    class Bad(RandomBatches):
        def batch(self, step):
            batch = super().batch(step)
            if step == 1 or step >= 5:
                batch.inputs[0, 0] = token
            return batch

    with pytest.raises(UserError, match=r"diverged at step 8.*checkpoint of step 6 is kept") as caught:
        _trainer(tmp_path, Bad(CONFIG.data)).run()
    assert ("loss nan" in str(caught.value)) == (bad == "loss")
    first, *_, last = (_saved(tmp_path, step) for step in (4, 6))
    assert all(np.isfinite(value).all() for value in last.values())
    counts = [int(saved["step"]) for saved in (first, last)]
    assert counts == [3, 4]  # of the steps 2 and 6 nothing came
    assert "warning: step 2 is skipped" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl", 8) if "skipped" in line] == [2, 6, 7]


DAMAGE = {
    "a byte": lambda file: file.write_bytes(b"\x55" + file.read_bytes()[1:]),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
    "zeros, as a lost page": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("part", ["params", "optimizer"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(undisturbed, tmp_path, part, kind, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    largest = max((run / "checkpoints" / "8" / part).rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)
    DAMAGE[kind](largest)
    checkpoints = Checkpoints(run)
    assert checkpoints.latest_step() == 6
    checkpoints.close()
    message = capsys.readouterr().err
    assert "warning: the checkpoint of step 8 is damaged (" in message
    assert message.endswith("; going on from step 6\n")
    if (part, kind) == ("params", "a byte"):
        _trainer(run).run()
        _same_run(run, undisturbed)


def test_nothing_but_damage_is_refused_and_a_damaged_best_is_not_taken(undisturbed, tmp_path):
    for run, kind in ((tmp_path / "a", "checkpoints"), (tmp_path / "b", "best")):
        shutil.copytree(undisturbed, run)
        for file in (run / kind).glob("*/params/**/*"):
            if file.is_file():
                file.write_bytes(file.read_bytes() + b"!")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(step 6: params.*; step 8: "):
        Checkpoints(tmp_path / "a")
    with pytest.raises(UserError, match=r"the best checkpoint in .* is damaged: params/.* is not as it was written"):
        restore_params(tmp_path / "b", {})
    checkpoints = Checkpoints(tmp_path / "b")
    assert (checkpoints.latest_step(), checkpoints.best_step(), checkpoints.best_objective()) == (8, None, float("inf"))
    checkpoints.close()


def test_damaged_checksums_say_nothing_of_a_checkpoint(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    for file in (tmp_path / "run" / "sums").iterdir():
        file.write_bytes(file.read_bytes()[:20])
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.latest_step() == 8
    checkpoints.close()


def test_a_checkpoint_counts_once_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """A power failure may leave names without their content, and Orbax does not bring every file to the disk."""
    reached, sealed = set(), []

    def fsync(handle):
        reached.add(os.fstat(handle).st_ino)

    def seal(path, content):
        step = tmp_path / path.stem.replace("-", "/")
        if content != checkpoint.UNFINISHED:
            sealed.append(path.stem)
            files = [file for file in (*step.rglob("*"), step, step.parent) if file.stat().st_ino not in reached]
            assert not files, files
        else:
            assert not step.exists() or len(list(step.parent.iterdir())) > checkpoint.KEPT[step.parent.name]
        write_atomic(path, content)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(checkpoint, "write_atomic", seal)
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        reached.clear()
        checkpoints.save(step, {"w": jnp.ones(3)}, {"m": jnp.ones(3)})
        reached.clear()
        checkpoints.save_best(step, {"w": jnp.ones(3)}, 1 / step)
    assert sealed == [f"{kind}-{step}" for step in (1, 2, 3) for kind in ("checkpoints", "best")]
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (3, 3)
    checkpoints.close()
    assert {path.name for path in (tmp_path / "sums").iterdir()} == {
        "checkpoints-2.json", "checkpoints-3.json", "best-3.json",
    }  # fmt: skip


def test_a_checkpoint_that_cannot_be_sealed_costs_none_before_it(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.ones(3)}, {"m": jnp.ones(3)})
        checkpoints.save_best(step, {"w": jnp.ones(3)}, 1 / step)

    def fails(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "sync_tree", fails)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.save(3, {"w": jnp.ones(3)}, {"m": jnp.ones(3)})
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.save_best(3, {"w": jnp.ones(3)}, 0.1)
    checkpoints.close()
    monkeypatch.undo()
    again = Checkpoints(tmp_path)
    assert (again.latest_step(), again.best_step(), again.best_objective()) == (2, 2, 0.5)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    again.close()


@pytest.mark.parametrize("left", ["as it was", "empty", "in part"])
def test_what_was_being_saved_or_removed_does_not_count(undisturbed, tmp_path, left, capsys):
    """As a kill or a power failure may leave it: nothing is said, and the run ends as if it had never been."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (best,) = (run / "best").iterdir()
    for step in (run / "checkpoints" / "8", best):
        (run / "sums" / f"{step.parent.name}-{step.name}.json").write_text(checkpoint.UNFINISHED)
        files = [file for file in step.rglob("*") if file.is_file()]
        for file in files[:: 1 if left == "empty" else 2] if left != "as it was" else ():
            file.write_bytes(b"") if left == "empty" else file.unlink()
    assert checkpoint.has_checkpoint(run)
    assert not checkpoint.has_checkpoint(run, ("best",))
    with pytest.raises(UserError, match="holds no best checkpoint; train that stage first"):
        restore_params(run, {})
    _trainer(run).run()
    err = capsys.readouterr().err
    assert "resuming" in err
    assert "at step 6 of 8" in err
    assert "warning" not in err
    _same_run(run, undisturbed)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["6", "8"]
    assert {path.name for path in (run / "sums").iterdir()} == {
        "checkpoints-6.json", "checkpoints-8.json", "best-8.json",
    }  # fmt: skip


def test_a_directory_is_one_runs(tmp_path):
    with alone(tmp_path), pytest.raises(UserError, match="another run is training in"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    class Filling(RandomBatches):
        def batch(self, step):
            if step == 3:
                monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
            return super().batch(step)

    with pytest.raises(UserError, match=r"no space left to save.*checkpoint of step 2 is intact"):
        _trainer(tmp_path, Filling(CONFIG.data)).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["2"]


def test_a_write_that_fails_is_one_line_and_earlier_checkpoints_stay(tmp_path):
    worker = [sys.executable, "-W", "error", "-m", "tests.train.worker", str(tmp_path), "0", "3"]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("stage 1 ")] == [
        f"error: no space left to save in {tmp_path}; the checkpoint of step 2 is intact; "
        "free some space and run the same command again"
    ]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert len(_saved(tmp_path, 2)) > 20


def test_steps_come_from_the_token_budget():
    config = run_config(1, steps=0)
    assert total_steps(config) == config.optim.tokens // (8 * 32)
    assert total_steps(run_config(1, steps=5)) == 5
