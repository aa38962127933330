"""The table of names is one to one, and configurations survive the way out and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lizard_jax.config import PRESETS, LizardConfig, LongRopeConfig, LoraConfig, ModelConfig, RopeConfig, YarnConfig
from lizard_jax.convert import table
from lizard_jax.convert.hf_config import hf_dict, lizard_config, lizard_section, model_config
from lizard_jax.convert.params import parameters, skeleton
from lizard_jax.nn.params import LoraParam, NewParam

LEARNED = LizardConfig(meta="learned", gate="low_rank", gate_bias=False)
EVERYTHING = ModelConfig(
    "qwen3", 31, 16, 24, 12, 4, 2, 8, 64, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True
)  # fmt: skip


@pytest.mark.parametrize("attention", [None, *PRESETS.values(), LEARNED])
def test_every_parameter_has_one_name_and_every_name_one_parameter(attention):
    config = ModelConfig(**{**EVERYTHING.__dict__, "attention": attention})
    lora = LoraConfig(targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    found = parameters(skeleton(config, lora))
    assert any(isinstance(variable, LoraParam) for variable in found.values())
    assert any(isinstance(variable, NewParam) for variable in found.values()) == (attention is not None)
    names = {}
    for path in found:
        name, transpose = table.to_hf(path)
        assert table.to_path(name) == (path, transpose)
        names[name] = path
    assert len(names) == len(found)


@pytest.mark.parametrize("name", ["model.layers.x.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weights", "embed"])
def test_a_name_outside_the_table_is_refused(name):
    for translate in (table.to_path, table.to_hf):
        with pytest.raises(KeyError):
            translate(name)


ROPES = st.sampled_from(
    [
        RopeConfig(theta=5e5),
        RopeConfig(kind="linear", factor=4.0),
        RopeConfig(kind="dynamic", factor=2.0, original_max_positions=64),
        RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 32),
        RopeConfig(kind="yarn", factor=4.0, original_max_positions=32, yarn=YarnConfig(1.25, 16.0, 2.0, False)),
        RopeConfig(
            kind="longrope",
            factor=4.0,
            original_max_positions=32,
            longrope=LongRopeConfig((1.0, 1.5, 2.0, 3.0), (1.0, 4.0, 5.0, 6.0), 1.25),
        ),
    ]
)


@given(
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    rope=ROPES,
    bias=st.booleans(),
    tied=st.booleans(),
    window=st.sampled_from([None, 16]),
    attention=st.sampled_from([None, *PRESETS.values()]),
)
def test_a_written_config_reads_back(kind, rope, bias, tied, window, attention):
    llama_bias = bias and kind in ("llama", "qwen3")
    config = ModelConfig(
        kind, 31, 16, 24, 3, 4, 2, 8, 64, 1e-4, rope, "gelu", tied,
        qkv_bias=llama_bias or kind == "qwen2", o_bias=llama_bias, mlp_bias=bias and kind == "llama",
        qk_norm=kind == "qwen3", sliding_window=None if kind == "llama" else window,
        sliding_window_layers=(0, 2) if kind.startswith("qwen") and window else None, attention=attention,
    )  # fmt: skip
    raw = hf_dict(config)
    assert model_config(raw, attention=lizard_config(raw["lizard"]) if attention else None) == config


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_what_transformers_leaves_out_takes_its_default(kind):
    """A config.json may name sizes alone: the rest is then what the class of transformers says."""
    import transformers

    sizes = {
        "vocab_size": 31, "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 32,
    }  # fmt: skip
    full = getattr(transformers, f"{kind}Config")(**sizes)
    bare = model_config({"model_type": kind.lower(), "architectures": None, **sizes})
    assert bare == model_config(full.to_dict() | {"architectures": None})


def test_settings_of_the_attention_survive():
    for attention in (*PRESETS.values(), LizardConfig(softmax_layers=(0, 3), beta_start=1.5)):
        assert lizard_config(lizard_section(attention)) == attention
