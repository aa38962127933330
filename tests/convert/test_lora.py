"""Adapters: no change at the start, the right sum afterwards, and the same model in PEFT's hands."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from lizard_jax.config import LoraConfig
from lizard_jax.convert.load import load_hf
from lizard_jax.convert.params import parameters
from lizard_jax.convert.save import save_hf
from lizard_jax.errors import UserError
from lizard_jax.lora import TARGETS, add_lora, merge_lora
from lizard_jax.nn.params import BaseParam, LoraParam
from tests.models import hf

EVERY = LoraConfig(rank=3, alpha=5.0, targets=TARGETS)


def adapted(directory, config=EVERY, dtype=None):
    model = add_lora(load_hf(directory, dtype=dtype), config, nnx.Rngs(0))
    for index, variable in enumerate(parameters(model, LoraParam).values()):
        variable.set_value(0.2 * jax.random.normal(jax.random.key(index), variable.shape))
    return model


def test_a_new_adapter_changes_nothing_and_is_float32(tmp_path):
    hf.make("Llama", tmp_path)
    tokens = jnp.asarray(hf.tokens(12))
    base = load_hf(tmp_path, dtype="bfloat16")
    expected = base(tokens)
    model = add_lora(base, LoraConfig(), nnx.Rngs(0))
    chex.assert_trees_all_equal(model(tokens), expected)
    new = parameters(model, LoraParam)
    assert len(new) == 2 * 3 * 2
    assert {variable.dtype for variable in new.values()} == {jnp.dtype("float32")}
    assert new["layers/0/attention/q_proj/lora_a"].shape == (32, 8)
    assert model.layers[0].attention.q_proj.lora_scale == 2.0


def test_merging_keeps_the_function_and_rounds_once(tmp_path):
    hf.make("Llama", tmp_path)
    tokens = jnp.asarray(hf.tokens(12))
    model = adapted(tmp_path)
    expected = model(tokens)
    assert float(jnp.max(jnp.abs(expected - load_hf(tmp_path)(tokens)))) > 0.1
    merged = merge_lora(model)
    chex.assert_trees_all_close(merged(tokens), expected, atol=1e-4, rtol=0)
    assert not parameters(merged, LoraParam)
    assert merged.lora is None

    model = adapted(tmp_path, dtype="bfloat16")
    linear = model.layers[1].mlp.down_proj
    exact = np.asarray(linear.kernel[...], np.float64) + (5 / 3) * (
        np.asarray(linear.lora_a[...], np.float64) @ np.asarray(linear.lora_b[...], np.float64)
    )
    once = jnp.asarray(exact.astype(np.float32)).astype(jnp.bfloat16)
    got = merge_lora(model).layers[1].mlp.down_proj.kernel[...]
    assert got.dtype == jnp.bfloat16
    # A float32 sum may fall on the other side of a rounding border once in a long while.
    assert float(jnp.mean(got != once)) < 2e-3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("config", [LoraConfig(rank=2), EVERY], ids=["default_targets", "every_projection"])
def test_peft_reads_the_adapter(config, tmp_path):
    import peft

    hf.make("Llama", tmp_path / "source")
    model = adapted(tmp_path / "source", config)
    save_hf(model, tmp_path / "out", source=tmp_path / "source", adapter=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = hf.tokens(16)
    tokens = jnp.asarray(ids)
    chex.assert_trees_all_close(hf.logits(base, ids), load_hf(tmp_path / "source")(tokens), atol=1e-4, rtol=0)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    chex.assert_trees_all_close(hf.logits(theirs, ids), model(tokens), atol=1e-4, rtol=0)
    save_hf(model, tmp_path / "merged", source=tmp_path / "source")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    chex.assert_trees_all_close(hf.logits(merged, ids), model(tokens), atol=1e-4, rtol=0)
    # Saving merged in a copy: the model itself keeps base and adapter apart.
    assert parameters(model, LoraParam)
    kernel = "layers/0/attention/q_proj/kernel"
    chex.assert_trees_all_equal(
        parameters(model, BaseParam)[kernel][...], parameters(load_hf(tmp_path / "source"), BaseParam)[kernel][...]
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(targets=("q_proj", "qq_proj")), "qq_proj"),
        (LoraConfig(targets=()), "none"),
        (LoraConfig(rank=0), "rank 0"),
    ],
)
def test_impossible_adapters_are_refused(config, words, tmp_path):
    hf.make("Llama", tmp_path)
    model = load_hf(tmp_path)
    with pytest.raises(UserError, match=words):
        add_lora(model, config, nnx.Rngs(0))
    add_lora(model, LoraConfig(), nnx.Rngs(0))
    with pytest.raises(UserError, match="already"):
        add_lora(model, LoraConfig(), nnx.Rngs(0))
