"""``train.py --plan``: what is planned is what a run has, and what cannot be planned is one line."""

import dataclasses
import importlib.util
import re
from typing import Any

import jax
import pytest

from benchmarks.chips import compilers
from lizard_jax.cli import load_recipe, override
from lizard_jax.config import LizardConfig, LoraConfig
from lizard_jax.models.flops import forward_flops
from lizard_jax.plan import absent, estimate, report, step
from lizard_jax.plan.report import shape_of
from lizard_jax.select import budgets
from lizard_jax.train import __main__ as train
from lizard_jax.train.optim import Optimizer
from lizard_jax.train.step import place
from pallas_kernels.chips import CHIPS
from tests.train.tiny import MODEL, make_model, mesh_of, run_config


@pytest.fixture(autouse=True)
def _compilers_notes():
    """libtpu reads its flags once in a process, and the compile gates beside these tests need theirs."""
    if importlib.util.find_spec("libtpu") is not None:
        compilers.tpu_slice("v5e")


needs_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("stage", [1, 2])
def test_what_lies_on_a_device_is_what_a_run_puts_there(stage):
    config, mesh = run_config(stage, lora=LoraConfig(rank=2)), mesh_of(data=2, fsdp=2, tensor=2)
    model = make_model(config)
    planned = step.parts(config, model.config, mesh)
    state = place(config, model, Optimizer(config.optim, 10), mesh)

    def held(tree) -> int:
        first = mesh.devices.flat[0]
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    assert planned.frozen == held(state.frozen)
    assert planned.trained == held(state.trainable)
    assert planned.optimizer == held(state.optimizer)


def test_the_likely_attention_fills_the_state_and_no_more():
    config = load_recipe("llama3_8b", 1)
    model = estimate.likely(config, shape_of(config))
    assert model.attention is not None
    assert model.attention.softmax_heads == tuple(f"{layer}.0" for layer in range(32))
    limit = budgets.size("1024tokens", model, model.attention)
    more = dataclasses.replace(model.attention, kept=model.attention.kept + 1)
    assert budgets.state_bytes(model, 8192) <= limit.bytes
    assert budgets.state_bytes(dataclasses.replace(model, attention=more), 8192) > limit.bytes
    assert 0 < model.attention.kept < 1024
    two = estimate.shallow(model, 2)
    assert two.attention is not None
    assert two.attention.softmax_heads == ("0.0", "1.0")


def test_forward_flops_are_two_for_each_weight_that_a_token_meets():
    D, M = MODEL.hidden_size, MODEL.intermediate_size
    heads = D * MODEL.head_dim * (2 * MODEL.num_heads + 2 * MODEL.kv_heads)
    weights = MODEL.num_layers * (heads + 3 * D * M) + MODEL.vocab_size * D
    assert forward_flops(MODEL, 10) == 2 * 10 * weights
    tied = dataclasses.replace(MODEL, tie_embeddings=not MODEL.tie_embeddings)
    assert forward_flops(tied, 10) == 2 * 10 * weights


@needs_tpu
def test_a_deep_model_is_planned_from_shallow_ones():
    """From one and two layers, what three take when they are compiled."""
    attention = LizardConfig(window=16, chunk=16, feature_half=8, kept=4)
    shape = dataclasses.replace(MODEL, num_layers=3, head_dim=16, attention=attention)
    config = override(run_config(1), {"attention": attention, "data.batch_size": 4, "data.sequence_length": 128})
    where = estimate.Machines(CHIPS["v5e"], 4)
    mesh = step.mesh_over(absent.tpus(where.chip, 4), (1, 4, 1, 1))
    planned = estimate.plan(config, shape, where, mesh, (1, 2))
    real = step.compiled(config, shape, where.chip, mesh)
    assert planned.flops == step.flops(config, shape)
    assert planned.parts == step.parts(config, shape, mesh)
    assert planned.links == pytest.approx(sum(real.moved.links.values()), rel=0.1)
    assert planned.memory == pytest.approx(real.moved.memory, rel=0.1)
    assert planned.temporaries == pytest.approx(real.temporaries, rel=0.25)
    assert planned.compute == pytest.approx(planned.flops / 4 / 197e12)
    assert 0 < planned.least <= planned.most
    assert planned.tracing > 0
    assert planned.compiling > 0


@pytest.mark.parametrize(
    ("temporaries", "depths", "fits"),
    [
        (29, (32,), True),
        (31, (32,), False),
        (9, (2, 4), True),
        (11, (2, 4), None),
        (119, (2, 4), None),
        (121, (2, 4), False),
    ],
)
def test_what_two_depths_leave_open_is_not_said_to_fit(temporaries, depths, fits):
    """Of 100 bytes 92 can be had: 52 lie there, up to 10 are code, and temporaries may be three times more or less."""
    assert _planned(1, temporaries, depths).fits(100.0) is fits


def _planned(unit: int, temporaries: float, depths: tuple[int, ...]) -> estimate.Plan:
    named: dict[str, Any] = {field.name: 1.0 for field in dataclasses.fields(estimate.Plan)}
    own = step.Parts(frozen=50 * unit, trained=unit, optimizer=unit, batch=0)
    named |= {"parts": own, "code": 10.0 * unit, "temporaries": temporaries * unit, "depths": depths}
    return estimate.Plan(**named | {"mesh": (1, 4, 1, 1), "remat": False, "kinds": {}})


@needs_tpu
def test_what_may_not_fit_is_advised_only_where_nothing_surely_does(monkeypatch, capsys):
    unit = int(CHIPS["v5e"].memory) // 100
    for temporaries, depths, row, advice in (
        ([11, 11, 9], (2, 4), "unsure", "best: --mesh-data=1 --mesh-fsdp=2 --mesh-tensor=2"),
        ([11, 11, 11], (2, 4), "unsure", "best, if it fits: --mesh-data=1 --mesh-fsdp=4 --mesh-tensor=1"),
        ([121, 121, 121], (2, 4), "no", "nothing fits 16 GiB"),
        ([29, 31, 31], (6,), "no", "best: --mesh-data=1 --mesh-fsdp=4 --mesh-tensor=1"),
    ):
        rest = iter(temporaries)

        def plan(config, shape, where, mesh, asked, rest=rest, depths=depths):
            return dataclasses.replace(_planned(unit, next(rest), depths), mesh=tuple(mesh.devices.shape))

        monkeypatch.setattr(report, "plan", plan)
        line = "--plan v5e-4 --window 16 --sequence-length 64 --batch-size 4"
        assert train.main(["--stage=1", *line.split()]) == 0
        printed = capsys.readouterr().out
        assert f" {row} " in printed
        assert advice in printed


@needs_tpu
def test_the_command_says_what_fits_and_what_it_costs(capsys):
    line = "--plan v5e-4 --plan-layers 1,2 --price 1.2 --window 16 --sequence-length 64 --batch-size 4 --mesh-fsdp 4"
    assert train.main(["--stage=1", "--tokens=25600", *line.split()]) == 0
    printed = capsys.readouterr().out
    assert "1 x 4 x 1" in printed
    assert " yes " in printed
    assert "best: --mesh-data=1 --mesh-fsdp=4 --mesh-tensor=1 --batch-size=4" in printed
    assert "100 steps" in printed
    assert "at 1.2 USD a device-hour" in printed
    assert "From the program compiled at 1 and 2 layers" in printed
    assert "--plan-layers 6 compiles it" in printed
    time = r"\d+ (seconds|minutes)"
    assert re.search(f"compiling come on top: the step once, roughly {time} of a processor", printed)
    assert re.search(f"; {time} of them again whenever the run starts", printed)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--plan h100", "give a chip and how many, as h100-8"),
        ("--plan b300-8", "the chips are a100, h100"),
        ("--plan v5e-5", "slices of v5e have 4, 8, 16"),
        ("--plan h100-12", "in whole nodes"),
        ("--plan h100-0", "give a chip and how many"),
        ("--plan v5e-4 --price 0", "is no price of a device-hour"),
        ("--plan v5e-4 --price nan", "is no price of a device-hour"),
        ("--price 3", "--price and --plan-layers belong to --plan"),
        ("--plan v5e-4 --state-bytes 10", "is too small: windows, memory and exact heads alone take"),
        ("--plan v5e-4 --heads auto:0", "0 of the key heads"),
        ("--plan v5e-4 --plan-layers 3", "give two depths to go on from, as 2,4, or all 6 alone"),
        ("--plan v5e-4 --plan-layers 0,2", "give two depths"),
        ("--plan v5e-4 --teacher nowhere", "nowhere does not exist"),
        ("--plan v5e-4 --mesh-fsdp 3", "must be 4"),
        ("--plan v5e-4 --batch-size 3", "does not divide"),
    ],
)
def test_what_cannot_be_planned_is_one_line(line, told, capsys):
    try:
        code = train.main(["--stage=1", *line.split()])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert told in error


def test_a_compiler_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    absent.tpus.cache_clear()
    assert train.main(["--stage=1", "--plan", "v5e-4"]) == 2
    assert "needs libtpu, which is not installed; uv run --group test" in capsys.readouterr().err
