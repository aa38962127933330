"""Our decoder against transformers, live, on small random models."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lizard_jax.convert.load import load_hf
from lizard_jax.data.text import load_tokenizer
from tests.jitted import logits
from tests.models import hf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.5, 4.0, 6.0],
    "original_max_position_embeddings": 32,
}
QWEN_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

GRID = {
    "mha": ("Llama", 24, {"num_key_value_heads": 4}),
    "gqa2_tied": ("Llama", 24, {"tie_word_embeddings": True}),
    "mqa": ("Llama", 24, {"num_key_value_heads": 1}),
    "biases": ("Llama", 24, {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("Llama", 24, {"head_dim": 12, "num_key_value_heads": 1}),
    "gelu": ("Llama", 24, {"hidden_act": "gelu_pytorch_tanh"}),
    "exact_gelu": ("Llama", 24, {"hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    "llama3_rope": ("Llama", 96, {"rope_parameters": LLAMA3, "max_position_embeddings": 256}),
    "linear_rope": ("Llama", 48, {"rope_parameters": LINEAR}),
    "dynamic_rope_short": ("Llama", 48, {"rope_parameters": DYNAMIC}),
    "dynamic_rope_at": ("Llama", 64, {"rope_parameters": DYNAMIC}),
    "dynamic_rope_long": ("Llama", 150, {"rope_parameters": DYNAMIC}),
    "yarn": ("Llama", 96, {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "yarn_scales": (
        "Mistral", 96,
        {"rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.7, "beta_fast": 4.0, "beta_slow": 0.5},
         "max_position_embeddings": 128, "sliding_window": None},
    ),
    "yarn_told": (
        "Qwen3", 96,
        {"rope_parameters": YARN | {"attention_factor": 1.4, "truncate": False}, "max_position_embeddings": 128},
    ),
    "longrope_short": ("Llama", 32, {"rope_parameters": LONGROPE, "max_position_embeddings": 128}),
    "longrope_long": ("Llama", 33, {"rope_parameters": LONGROPE, "max_position_embeddings": 128}),
    "longrope_told": (
        "Qwen2", 96,
        {"rope_parameters": LONGROPE | {"attention_factor": 1.3, "factor": 8.0}, "max_position_embeddings": 128},
    ),
    "mish": ("Llama", 24, {"hidden_act": "mish"}),
    "relu2": ("Llama", 24, {"hidden_act": "relu2"}),
    "mistral": ("Mistral", 24, {"sliding_window": None}),
    "mistral_window": ("Mistral", 40, {"sliding_window": 7, "head_dim": 16}),
    "mistral_window_tied": ("Mistral", 40, {"sliding_window": 1, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", 24, {}),
    "qwen2_sliding": ("Qwen2", 24, QWEN_SLIDING),
    "qwen3": ("Qwen3", 24, {"head_dim": 16}),
    "qwen3_sliding": ("Qwen3", 24, {**QWEN_SLIDING, "head_dim": 8, "attention_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", GRID)
def test_logits_equal_those_of_transformers(name, tmp_path):
    kind, length, changes = GRID[name]
    reference = hf.make(kind, tmp_path, **changes)
    ids = hf.tokens(length)
    ours = logits(load_hf(tmp_path), ids)
    assert ours.dtype == jnp.float32
    expected = hf.logits(reference, ids)
    assert np.std(np.asarray(expected)) > 0.1, "logits too small for the tolerance to mean anything"
    chex.assert_trees_all_close(ours, expected, atol=1e-4, rtol=0)


def test_scaled_rope_written_by_older_transformers_is_read(tmp_path):
    """Before version 5 the angle settings were ``rope_theta`` and ``rope_scaling``."""
    reference = hf.make("Llama", tmp_path, rope_parameters=LLAMA3, max_position_embeddings=256)
    from lizard_jax.convert.files import read_json, write_json

    raw = read_json(tmp_path / "config.json")
    if "rope_parameters" in raw:
        raw["rope_scaling"] = raw.pop("rope_parameters")
        raw["rope_theta"] = raw["rope_scaling"].pop("rope_theta")
    new = raw["rope_scaling"]
    raw["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in new.items()}
    write_json(tmp_path / "config.json", raw)
    ids = hf.tokens(96)
    chex.assert_trees_all_close(logits(load_hf(tmp_path), ids), hf.logits(reference, ids), atol=1e-4, rtol=0)


def test_bfloat16_stays_within_its_rounding(tmp_path):
    """Both sides round every activation to 8 bits, at different places, so their errors are of one size.

    Ours is held against the float32 truth: it may be off by no more than 1.5 times what transformers is.
    """
    reference = hf.make("Llama", tmp_path, attention_bias=True)
    ids = hf.tokens(48)
    truth = hf.logits(reference, ids)
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    # Loaded anew, since changing the dtype in memory rounds the rotary frequencies too.
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    theirs = hf.logits(rounded.eval(), ids)
    model = load_hf(tmp_path / "bf16")
    assert model.embed.embedding.dtype == jnp.bfloat16
    ours = model(jnp.asarray(ids))
    assert ours.dtype == jnp.float32
    rms = [float(jnp.sqrt(jnp.mean(jnp.square(x - truth)))) for x in (ours, theirs)]
    assert rms[0] < 1.5 * rms[1] < 0.1 * float(jnp.std(truth)), rms


def test_babyllama(shared_data):
    directory = shared_data / "babyllama"
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = hf.tokens(256, vocab=105)
    ours = logits(load_hf(directory), ids)
    chex.assert_trees_all_close(ours, hf.logits(reference, ids), atol=1e-4, rtol=0)
    story = (shared_data / "tinystories.txt").read_text(encoding="utf-8")[:200]
    tokenizer = load_tokenizer(directory)
    ids = np.asarray(tokenizer(story)["input_ids"], np.int32)[None]
    scores = np.asarray(logits(load_hf(directory), ids))[0, :-1]
    picked = np.take_along_axis(scores, ids[0, 1:, None], axis=1)[:, 0]
    loss = np.mean(np.log(np.sum(np.exp(scores - picked[:, None]), axis=1)))
    assert float(loss) < 1.6, f"a trained model should read a story well; random is 4.65, this is {loss}"
