"""The same run on one device and on meshes of eight."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from lizard_jax import losses, sharding
from lizard_jax.cli import override
from lizard_jax.config import DataConfig
from lizard_jax.train import stages
from lizard_jax.train.checkpoint import Checkpoints, named, restore_params
from lizard_jax.train.optim import Optimizer
from lizard_jax.train.step import eval_step, in_parts, place, train_step
from pallas_kernels import partition
from tests.train.tiny import MODEL, RandomBatches, make_model, mesh_of, run_config


def _placed(batch, mesh):
    return sharding.put_batch(batch, mesh)


def _host(tree):
    return {name: np.asarray(leaf) for name, leaf in named(tree).items()}


def _close(one, many, tolerance):
    """Each array to ``tolerance`` of its own largest value."""
    assert one.keys() == many.keys()
    for name, value in one.items():
        scale = np.abs(value).max() + 1e-30
        assert np.abs(value - many[name]).max() <= tolerance * scale, name


def _first_step(config, mesh, shape=MODEL):
    state = place(config, make_model(config, shape), Optimizer(config.optim, 1), mesh)

    @jax.jit
    def grads(trainable, frozen, batch):
        with partition.over(sharding.kernel_partition(mesh)):
            return stages.loss_and_grads(config, nnx.merge(state.graph, trainable, frozen), batch)

    found, metrics = grads(state.trainable, state.frozen, _placed(RandomBatches(config.data).batch(0), mesh))
    return _host(found), float(metrics["loss"])


def test_first_step_in_fp32():
    config = run_config(2)
    one, loss = _first_step(config, mesh_of())
    many, loss_many = _first_step(config, mesh_of(fsdp=8))
    np.testing.assert_allclose(loss_many, loss, rtol=1e-5)
    assert any(np.abs(value).max() > 0 for value in one.values())
    _close(one, many, 1e-5)


@pytest.mark.usefixtures("x64")
def test_devices_that_share_a_text():
    """Three heads of a class and one that sees all of the past, over four devices and two: some run twice."""
    config = run_config(2, dtype="float64", data=DataConfig(sequence_length=32, batch_size=2, held_out_tokens=512))
    config = override(config, {"attention.kept": 6, "attention.softmax_heads": ("0.1",), "kl": 0.0, "remat": False})
    shape = dataclasses.replace(MODEL, num_layers=1, num_heads=8, kv_heads=4)
    one, loss = _first_step(config, mesh_of(), shape)
    many, loss_many = _first_step(config, mesh_of(fsdp=2, seq=4), shape)
    np.testing.assert_allclose(loss_many, loss, rtol=1e-12)
    assert {"gate", "phi_q", "q_proj"} <= {
        part for name, value in one.items() if value.any() for part in name.split("/")
    }
    _close(one, many, 1e-10)


def _ragged(config):
    """A batch whose rows score different numbers of positions."""
    batch = RandomBatches(config.data).batch(0)
    for row in range(len(batch.inputs)):
        batch.segment_ids[row, 32 - 3 * row :] = 0
        batch.loss_mask[row, 32 - 3 * row :] = 0.0
    return batch


@pytest.mark.parametrize(("stage", "fsdp"), [(0, 1), (2, 2)])
@pytest.mark.usefixtures("x64")
def test_a_batch_in_parts_is_the_batch(stage, fsdp):
    whole, mesh = run_config(stage, dtype="float64", remat=False), mesh_of(fsdp=fsdp)
    found = []
    for parts in (1, 4):
        config = override(whole, {"data.accumulate": parts})
        state = place(config, make_model(config), Optimizer(config.optim, 1), mesh)

        @jax.jit
        def grads(trainable, frozen, batch, config=config, graph=state.graph):
            with partition.over(sharding.kernel_partition(mesh)):
                return in_parts(config, nnx.merge(graph, trainable, frozen), batch)

        got, metrics = grads(state.trainable, state.frozen, _placed(_ragged(config), mesh))
        found.append((_host(got), float(metrics["loss"])))
    (one, loss), (many, loss_many) = found
    np.testing.assert_allclose(loss_many, loss, rtol=1e-12)
    _close(one, many, 1e-10)


def test_parts_of_stage_1_are_means_by_what_they_hold():
    """Each part's error is relative to its own teacher's power, and counts by its real positions."""
    config, mesh = run_config(1), mesh_of()
    model, batch = make_model(config), _ragged(config)
    alone = jax.jit(lambda model, batch: stages.loss_and_grads(config, model, batch)[1]["loss"])
    cut = [jax.tree.map(lambda a, at=at: a[at : at + 4], batch) for at in (0, 4)]
    counts = [int((part.segment_ids != 0).sum()) for part in cut]
    expected = sum(float(alone(model, part)) * n for part, n in zip(cut, counts, strict=True)) / sum(counts)
    halves, optimizer = override(config, {"data.accumulate": 2}), Optimizer(config.optim, 4)
    state = place(halves, model, optimizer, mesh)
    step = train_step(halves, optimizer, state, mesh)
    _, _, metrics = step(state.trainable, state.optimizer, state.frozen, _placed(batch, mesh))
    np.testing.assert_allclose(float(metrics["loss"]), expected, rtol=1e-5)


def _fifty_steps(config, mesh):
    optimizer = Optimizer(config.optim, 50)
    state = place(config, make_model(config), optimizer, mesh)
    step = train_step(config, optimizer, state, mesh)
    trainable, moments = state.trainable, state.optimizer
    for index in range(50):
        batch = _placed(RandomBatches(config.data).batch(index), mesh)
        trainable, moments, metrics = step(trainable, moments, state.frozen, batch)
    return _host(trainable), _host(moments), float(metrics["loss"])


@pytest.mark.parametrize(("stage", "axis"), [(1, "data"), (2, "seq")])
@pytest.mark.usefixtures("x64")
def test_fifty_steps_in_float64(stage, axis):
    config = run_config(stage, dtype="float64")
    one, moments, loss = _fifty_steps(config, mesh_of())
    many, moments_many, loss_many = _fifty_steps(config, mesh_of(fsdp=2, tensor=2, **{axis: 2}))
    assert all(value.dtype == np.float64 for value in one.values())
    np.testing.assert_allclose(loss_many, loss, rtol=1e-5)
    _close(one, many, 1e-5)
    _close(moments, moments_many, 1e-5)


def test_a_checkpoint_moves_between_meshes(tmp_path):
    config = run_config(1)
    optimizer = Optimizer(config.optim, 1)
    saved = place(config, make_model(config), optimizer, mesh_of(fsdp=2, tensor=4))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, saved.trainable, saved.optimizer)

    mesh = mesh_of(fsdp=4, tensor=2)
    blank = jax.tree.map(np.zeros_like, jax.device_get((saved.trainable, saved.optimizer)))
    params, moments, step = checkpoints.restore(*blank, mesh)
    checkpoints.close()
    assert step == 1
    for tree, original in ((params, saved.trainable), (moments, saved.optimizer)):
        got, want = named(tree), named(original)
        wanted = named(sharding.state_shardings(tree, mesh))
        for name, leaf in got.items():
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want[name]))
            assert leaf.sharding == wanted[name], name
    on_host, _ = restore_params(tmp_path, blank[0], "latest")
    for name, leaf in named(on_host).items():
        np.testing.assert_array_equal(leaf, np.asarray(named(saved.trainable)[name]))


def _collectives(text: str) -> list[tuple[str, int]]:
    """Of a compiled program, each collective and the numbers in its largest result."""
    found = []
    for line in text.splitlines():
        match = re.search(
            r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line
        )
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append((match[2], max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)))
    return found


@pytest.mark.parametrize("form", ["stage 1", "stage 2", "stage 2, KL in slices", "stage 2, texts split", "validation"])
def test_devices_exchange_weights_and_no_activations(form, monkeypatch):
    """On eight devices nothing of a whole batch's activations, of its MLP's width, or of logits goes over a link."""
    if "KL" in form:
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 2048)
    split = "split" in form
    data = DataConfig(sequence_length=256 if split else 64, batch_size=4 if split else 8, held_out_tokens=512)
    config = run_config(1 if form == "stage 1" else 2, data=data)
    mesh, optimizer = mesh_of(data=2, fsdp=2, seq=2) if split else mesh_of(data=2, fsdp=4), Optimizer(config.optim, 1)
    state = place(config, make_model(config), optimizer, mesh)
    batch = _placed(RandomBatches(config.data).batch(0), mesh)
    if form == "validation":
        compiled = eval_step(config, state, mesh).lower(state.trainable, state.frozen, batch).compile()
    else:
        step = train_step(config, optimizer, state, mesh)
        compiled = step.lower(state.trainable, state.optimizer, state.frozen, batch).compile()
    found = _collectives(compiled.as_text())
    assert any(kind == "all-gather" for kind, _ in found)
    largest = max(np.asarray(leaf).size for leaf in jax.tree.leaves(state.frozen))
    # A device's own row of activations is as large as the largest weight here; eight rows are far more.
    assert max(size for _, size in found) <= largest, sorted(found, key=lambda one: -one[1])[:5]
