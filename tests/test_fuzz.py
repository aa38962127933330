"""Every JSON and safetensors file that comes from outside, with a thing wrong: one line of refusal, or the right value.

Seeded, 2,000 inputs a door and more. What must not happen is any other exception than ``UserError``.
"""

import contextlib
import functools
import json
import struct

import numpy as np
import pytest

from lizard_jax.cli import from_dict
from lizard_jax.config import LizardConfig, RunConfig, to_dict
from lizard_jax.convert.files import read_json
from lizard_jax.convert.hf_config import lizard_config, model_config
from lizard_jax.convert.load import _lora_config
from lizard_jax.convert.origin import read_manifest
from lizard_jax.convert.params import misfits, parameters, skeleton
from lizard_jax.convert.weights import open_weights
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from lizard_jax.generate.prompts import end_tokens
from lizard_jax.select import budgets, choice
from tests.scripted import scripted

pytestmark = pytest.mark.slow
CASES = 2000
JUNK = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 1e300, -0.5, float("nan"), float("inf"), "", "false", "12",
    "\ud800", [], [1], [[]], ["x"], {}, {"a": 1}, {"rope_type": "linear", "factor": "2"}, {"rope_type": ["yarn"]},
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return scripted(tmp_path_factory.mktemp("fuzz") / "model")


def changed(rng: np.random.Generator, value):
    """The value with one or two of its leaves, or branches, replaced by junk, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(int(rng.integers(1, 3))):
        spots = list(places(value))
        holder, key = spots[rng.integers(len(spots))]
        junk = JUNK[rng.integers(len(JUNK))]
        if isinstance(holder, dict) and rng.random() < 0.1:
            del holder[key]
        else:
            holder[key] = json.loads(json.dumps(junk))
        if not (isinstance(value, dict) and value):
            break
    return value


def places(value):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def told(call) -> bool:
    """Whether it was refused, in one line; nothing else may be raised."""
    refusal = ""
    try:
        call()
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal.strip()
    assert len(refusal) < 1500
    return bool(refusal)


def test_config_json(checkpoint):
    rng = np.random.default_rng(0)
    good = json.loads((checkpoint / "config.json").read_text()) | {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64},
        "sliding_window": None, "layer_types": ["full_attention"], "head_dim": 66, "attention_bias": False,
    }  # fmt: skip
    model_config(good)
    families = ("llama", "mistral", "qwen2", "qwen3")
    names = dict(zip(families, ("Llama", "Mistral", "Qwen2", "Qwen3"), strict=True))
    refused = 0
    for case in range(2 * CASES):
        family = families[case % 4]
        raw = good | {"model_type": family, "architectures": [f"{names[family]}ForCausalLM"]}
        refused += told(functools.partial(model_config, changed(rng, raw)))
    assert refused > CASES / 2


def test_sizes_are_known_not_to_fit_before_anything_is_allocated(checkpoint):
    rng = np.random.default_rng(1)
    good = json.loads((checkpoint / "config.json").read_text())
    infos = open_weights(checkpoint).infos
    for _ in range(60):
        key = ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads")[rng.integers(4)]
        raw = good | {key: int(2 ** rng.integers(3, 30))}
        with contextlib.suppress(UserError):
            assert misfits(parameters(skeleton(model_config(raw))), infos)


def test_the_lizard_section():
    rng = np.random.default_rng(2)
    good = to_dict(LizardConfig())
    lizard_config(good)
    assert sum(told(functools.partial(lizard_config, changed(rng, good))) for _ in range(CASES)) > CASES / 2


def test_run_json():
    rng = np.random.default_rng(3)
    good = to_dict(RunConfig())
    from_dict(RunConfig, json.loads(json.dumps(good)))
    assert sum(told(functools.partial(from_dict, RunConfig, changed(rng, good))) for _ in range(CASES)) > CASES / 2


def test_generation_config(checkpoint):
    rng = np.random.default_rng(4)
    tokenizer = load_tokenizer(checkpoint)
    file = checkpoint / "generation_config.json"
    good = json.loads(file.read_text())
    for _ in range(CASES):
        file.write_text(json.dumps(changed(rng, good)))
        told(lambda: end_tokens(str(checkpoint), tokenizer))
    file.write_text(json.dumps(good))


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "lizard_flax.json"])
def test_index_and_manifest(tmp_path, name):
    rng = np.random.default_rng(5)
    good = {"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    if name == "lizard_flax.json":
        good = {"format": 1, "parameters": {"a": ["float32", [2]]}, "lora": None, "tied_copy": False}
        (tmp_path / name).write_text(json.dumps(good))
        assert read_manifest(tmp_path) == good
    read = open_weights if name != "lizard_flax.json" else read_manifest
    for _ in range(CASES):
        (tmp_path / name).write_text(json.dumps(changed(rng, good)))
        told(lambda: read(tmp_path))


DOORS = {
    "heads.json": (choice.read, {"format": 1, "by": "loss", "layers": 2, "kv_heads": 1, "scores": [[0.5], [1.5]]}),
    "budgets.json": (
        budgets.read,
        {"format": 1, "window": 8, "kept": [0, 2, 8], "errors": [[[3.0, 2.0, 0.5]], [[1.0, 0.5, 0.0]]]},
    ),
    "adapter_config.json": (
        lambda file: _lora_config(file.parent),
        {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
            "bias": "none",
            "use_rslora": True,
        },
    ),
}


@pytest.mark.parametrize("name", DOORS)
def test_what_other_commands_wrote(tmp_path, name):
    rng, (read, good) = np.random.default_rng(8), DOORS[name]
    file = tmp_path / name
    file.write_text(json.dumps(good))
    assert not told(lambda: read(file))
    refused = 0
    for _ in range(CASES):
        file.write_text(json.dumps(changed(rng, good)))
        refused += told(lambda: read(file))
    assert refused > CASES // 4


def test_safetensors(tmp_path):
    """Headers with one thing wrong, and bytes turned over, cut off and added."""
    rng = np.random.default_rng(6)
    file = tmp_path / "model.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    data = bytes(range(32))

    def write(text: bytes, body: bytes = data) -> None:
        file.write_bytes(struct.pack("<Q", len(text)) + text + body)

    def read() -> None:
        weights = open_weights(tmp_path)
        for name, info in weights.infos.items():
            if info.dtype in ("F32", "BF16"):
                weights.read(name)

    write(json.dumps(header).encode())
    read()
    refused = 0
    for case in range(CASES):
        text = json.dumps(changed(rng, header)).encode()
        if case % 4 == 1:
            text, at = bytearray(json.dumps(header).encode()), int(rng.integers(20))
            text[at] ^= 1 << int(rng.integers(8))
        write(bytes(text), data[: int(rng.integers(33))] if case % 4 == 2 else data)
        if case % 4 == 3:
            whole = bytearray(file.read_bytes())
            whole[int(rng.integers(8))] ^= 1 << int(rng.integers(8))
            file.write_bytes(bytes(whole))
        refused += told(read)
    assert refused > CASES / 2


def test_overlaps_and_names_that_come_twice_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    overlap = {
        "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [8], "data_offsets": [4, 12]},
    }
    text = json.dumps(overlap).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with pytest.raises(UserError, match="overlap"):
        open_weights(tmp_path)
    entry = '"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}'
    twice = f"{{{entry}, {entry.replace('[0, 4]', '[4, 8]')}}}".encode()
    file.write_bytes(struct.pack("<Q", len(twice)) + twice + bytes(8))
    with pytest.raises(UserError, match="'a' twice"):
        open_weights(tmp_path)


def test_an_index_does_not_lead_out_of_its_directory(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    (tmp_path / "secret.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(UserError, match=r"names '../secret.safetensors', which is no file of this directory"):
        open_weights(tmp_path / "model")


def test_files_that_are_none_or_too_deep(tmp_path):
    import os

    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="no regular file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "deep.json").write_text('{"a":' * 200_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_json(tmp_path / "deep.json")
