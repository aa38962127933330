import dataclasses
import json

import pytest

from lizard_jax import cli
from lizard_jax.config import PRESETS, LizardConfig, RunConfig, to_dict
from lizard_jax.errors import UserError


@pytest.mark.parametrize("name", cli.recipes())
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_recipes_survive_json_and_name_themselves(name, stage):
    try:
        config = cli.load_recipe(name, stage)
    except UserError:
        assert stage == 0, f"{name} lacks stage {stage}"
        return
    assert (config.recipe, config.stage) == (name, stage)
    assert cli.from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_flags_are_distinct_and_cover_every_field():
    flags = list(cli.flags())
    assert len({flag.flag for flag in flags}) == len(flags)
    assert {flag.key for flag in flags} == set(cli.flatten(RunConfig()))
    assert {"--data", "--data-seed", "--seed", "--mesh-data", "--config"} <= {flag.flag for flag in flags}


def test_overrides_of_every_kind():
    line = (
        "--stage=2 --data some.txt --learning-rate 3e-4 --tokens 2e6 --no-segment-mask --full --gate channel "
        "--no-gate-bias --lora-targets q_proj,o_proj --softmax-layers 0,5 --mesh-data 2 --data-seed 7 --seed 8"
    )
    config, given = cli.parse(line.split())
    assert (config.stage, config.data.path, config.data.segment_mask, config.full) == (2, "some.txt", False, True)
    assert (config.optim.learning_rate, config.optim.tokens) == (3e-4, 2_000_000)
    assert (config.attention.gate, config.attention.gate_bias) == ("channel", False)
    assert (config.lora.targets, config.attention.softmax_layers) == (("q_proj", "o_proj"), (0, 5))
    assert (config.mesh.data, config.data.seed, config.seed) == (2, 7, 8)
    assert {"data.path", "attention.gate", "optim.tokens"} <= given
    assert "attention.window" not in given


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_keeps_the_recipes_own_changes_and_the_command_line_wins(name):
    recipe = cli.load_recipe("tiny", 1)
    config, _ = cli.parse(["--preset", name])
    own = recipe.attention
    wanted = dataclasses.replace(PRESETS[name], window=own.window, chunk=own.chunk)
    if name == recipe.preset:
        wanted = dataclasses.replace(wanted, feature_half=own.feature_half, kept=own.kept)
    assert config.attention == wanted
    config, _ = cli.parse(["--preset", name, "--window", "16"])
    assert config.attention == dataclasses.replace(wanted, window=16)


def test_another_preset_keeps_its_own_feature_width_and_keeps_no_pairs():
    ours, _ = cli.parse(["--config", "llama3_8b"])
    assert (ours.attention.window, ours.state_bytes, ours.attention.feature_half) == (128, "1024tokens", 32)
    assert (ours.heads, ours.attention.retrieval_window) == ("auto:10%", 8192)
    theirs, _ = cli.parse(["--config", "llama3_8b", "--preset", "lolcats"])
    assert (theirs.attention.window, theirs.state_bytes, theirs.attention.feature_half) == (128, "", 0)
    assert (theirs.heads, theirs.attention.retrieval_window) == ("", 0)
    asked, _ = cli.parse(["--config", "llama3_8b", "--preset", "lolcats", "--feature-half", "16"])
    assert asked.attention.feature_half == 16


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--config nope", "tiny"),
        ("--preset nope", "lizard_sink"),
        ("--memory all", "combine=sum"),
    ],
)
def test_unknown_names_and_refused_pairs_tell_the_choices(line, told):
    with pytest.raises(UserError, match=told):
        cli.parse(line.split())


@pytest.mark.parametrize("line", ["--stage 5", "--window x", "--window 2.5", "--gate nope", "--nope", "--out"])
def test_malformed_lines_are_one_line_and_code_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(line.split())
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_help_shows_every_flag_with_the_recipes_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in cli.flags():
        assert flag.flag in text
    assert f"(default: {cli.load_recipe('tiny', 1).optim.tokens})" in " ".join(text.split())


def test_a_setting_of_another_version_is_named():
    with pytest.raises(UserError, match="bogus"):
        cli.from_dict(LizardConfig, {"bogus": 1})
