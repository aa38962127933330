"""Checkpoints out and in again: byte for byte, plain, sharded, linearized and with adapters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

import lizard_jax
from lizard_jax.config import LizardConfig, LoraConfig, MeshConfig, preset
from lizard_jax.convert.flax_dir import load_flax, save_flax
from lizard_jax.convert.load import load_hf
from lizard_jax.convert.params import parameters
from lizard_jax.convert.save import save_hf
from lizard_jax.errors import UserError
from lizard_jax.lora import add_lora
from lizard_jax.nn.params import BaseParam, LoraParam, NewParam
from lizard_jax.sharding import make_mesh
from tests.jitted import logits
from tests.models import hf

ROOT = Path(__file__).resolve().parents[2]
WINDOWED = LizardConfig(window=8, chunk=4)


def raw_tensors(directory: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor of an HF directory as bytes, read by the safetensors library."""
    out = {}
    for file in sorted(directory.glob("model*.safetensors")):
        for name, tensor in load_file(file).items():
            out[name] = (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return out


def assert_same_model(ours, theirs):
    assert ours.config == theirs.config
    assert ours.lora == theirs.lora
    left, right = parameters(ours), parameters(theirs)
    assert left.keys() == right.keys()
    for path in left:
        assert type(left[path]) is type(right[path])
        assert left[path].dtype == right[path].dtype, path
        assert np.asarray(left[path][...]).tobytes() == np.asarray(right[path][...]).tobytes(), path


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / "convert.py", *map(str, arguments)], capture_output=True, text=True)


def test_babyllama_through_the_command_line(shared_data, tmp_path):
    source = shared_data / "babyllama"
    done = convert("hf2flax", source, tmp_path / "flax")
    assert done.returncode == 0, done.stderr
    assert "47 tensors, 936,448 parameters" in done.stdout
    assert "47 tensors" in done.stderr
    assert "B/s" in done.stderr
    done = convert("flax2hf", tmp_path / "flax", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert raw_tensors(tmp_path / "hf") == raw_tensors(source)
    for file in source.iterdir():
        if file.name != "model.safetensors":
            assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["flax", "hf"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sharded_mistral_keeps_every_byte_and_every_file(dtype, tmp_path):
    source = tmp_path / "source"
    reference = hf.make("Mistral", source, sliding_window=7).to(dtype)
    reference.save_pretrained(source, max_shard_size="10KB")
    (source / "model.safetensors").unlink()
    assert len(list(source.glob("model-*.safetensors"))) > 2
    (source / "LICENSE.txt").write_text("as you like")
    (source / "tokenizer.json").write_text("{}")
    save_flax(load_hf(source), tmp_path / "flax", source=source)
    model = load_flax(tmp_path / "flax")
    save_hf(model, tmp_path / "hf", source=tmp_path / "flax", shard_bytes=10_000)

    assert raw_tensors(tmp_path / "hf") == raw_tensors(source)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == raw_tensors(source).keys()
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in raw_tensors(source).values())
    for name in ("config.json", "generation_config.json", "LICENSE.txt", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes(), name
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").eval()
    assert back.dtype == dtype
    ids = hf.tokens(20)
    # Not the model in memory: changing its dtype rounded its rotary frequencies too.
    reference = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    chex.assert_trees_all_equal(hf.logits(back, ids), hf.logits(reference, ids))
    if dtype == torch.float32:
        chex.assert_trees_all_close(model(jnp.asarray(ids)), hf.logits(back, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1_6"])
def test_torch_bin_reads_as_safetensors_do(shards, zipped, tmp_path):
    hf.make("Llama", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = load_hf(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for shard in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name] for name in names[shard::shards]}
        torch.save(part, tmp_path / file, _use_new_zipfile_serialization=zipped)
        where |= dict.fromkeys(part, file)
    if shards > 1:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same_model(load_hf(tmp_path), expected)


def test_old_buffers_and_a_copied_head_survive_the_round_trip(tmp_path):
    source = tmp_path / "source"
    hf.make("Llama", source, tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.arange(4, dtype=torch.float32)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    save_flax(load_hf(source), tmp_path / "flax", source=source)
    save_hf(load_flax(tmp_path / "flax"), tmp_path / "hf", source=tmp_path / "flax")
    assert raw_tensors(tmp_path / "hf") == raw_tensors(source)
    save_hf(load_hf(source), tmp_path / "direct", source=source)
    assert raw_tensors(tmp_path / "direct") == raw_tensors(source)


@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
@pytest.mark.parametrize("name", ["lizard", "lizard_paper", "lizard_sink", "lolcats"])
def test_a_linearized_model_comes_back_identical(name, adapter, tmp_path):
    source = tmp_path / "source"
    hf.make("Llama", source)
    settings = preset(name)
    model = load_hf(source, attention=settings, dtype=jnp.bfloat16, seed=3)
    model = jax.tree.map(lambda x: x, trained(model, rank=2 if adapter else 0))
    save_flax(model, tmp_path / "flax", source=source)
    assert_same_model(load_flax(tmp_path / "flax"), model)
    save_hf(load_flax(tmp_path / "flax"), tmp_path / "hf", source=tmp_path / "flax", adapter=adapter)
    back = lizard_jax.load(tmp_path / "hf")
    assert_same_model(back, model)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_model(load_hf(tmp_path / "hf", attention=settings), model)
    with pytest.raises(UserError, match="linearized already"):
        load_hf(tmp_path / "hf", attention=LizardConfig(window=99))
    # The base alone is what transformers reads.
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert base.dtype == torch.bfloat16


def trained(model, *, rank: int):
    """The model with adapters where a rank is given, and noise on all that training would change."""
    if rank:
        model = add_lora(model, LoraConfig(rank=rank, alpha=3.0), nnx.Rngs(1))
    key = jax.random.key(5)
    for kind in (NewParam, LoraParam):
        for index, variable in enumerate(parameters(model, kind).values()):
            noise = 0.1 * jax.random.normal(jax.random.fold_in(key, index), variable.shape)
            variable.set_value(variable[...] + noise)
    return model


def test_lizard_outputs_survive_as_well(tmp_path):
    hf.make("Llama", tmp_path / "source")
    model = trained(load_hf(tmp_path / "source", attention=WINDOWED), rank=2)
    tokens = jnp.asarray(hf.tokens(30))
    expected = logits(model, tokens)
    save_hf(model, tmp_path / "adapter", source=tmp_path / "source", adapter=True)
    chex.assert_trees_all_equal(logits(load_hf(tmp_path / "adapter"), tokens), expected)
    save_hf(model, tmp_path / "merged", source=tmp_path / "source")
    chex.assert_trees_all_close(logits(load_hf(tmp_path / "merged"), tokens), expected, atol=1e-4, rtol=0)


def test_fresh_modules_follow_the_seed(tmp_path):
    hf.make("Llama", tmp_path)
    assert_same_model(load_hf(tmp_path, attention=WINDOWED, seed=4), load_hf(tmp_path, attention=WINDOWED, seed=4))
    first, second = (
        parameters(load_hf(tmp_path, attention=WINDOWED, seed=seed), NewParam)["layers/0/attention/mixer/phi_q/kernel"]
        for seed in (4, 5)
    )
    assert bool(jnp.any(first[...] != second[...]))


def test_parameters_arrive_spread_over_a_mesh(tmp_path):
    hf.make("Llama", tmp_path / "hf")
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    whole = load_hf(tmp_path / "hf", attention=WINDOWED)
    save_flax(whole, tmp_path / "flax", source=tmp_path / "hf")
    for spread in (load_hf(tmp_path / "hf", attention=WINDOWED, mesh=mesh), load_flax(tmp_path / "flax", mesh=mesh)):
        assert_same_model(spread, whole)
        kernel = spread.layers[0].attention.q_proj.kernel[...]
        assert kernel.addressable_shards[0].data.shape == (8, 16)


def test_dtype_is_of_the_base_weights_alone(tmp_path):
    hf.make("Llama", tmp_path / "hf")
    save_flax(load_hf(tmp_path / "hf", attention=WINDOWED), tmp_path / "flax", source=tmp_path / "hf")
    for model in (
        load_hf(tmp_path / "hf", attention=WINDOWED, dtype="bfloat16"),
        lizard_jax.load(tmp_path / "flax", dtype=jnp.bfloat16),
    ):
        assert {variable.dtype for variable in parameters(model, BaseParam).values()} == {jnp.dtype(jnp.bfloat16)}
        assert {variable.dtype for variable in parameters(model, NewParam).values()} == {jnp.dtype(jnp.float32)}
        assert bool(jnp.all(jnp.isfinite(logits(model, hf.tokens(20)))))


MEMORY = """
import ctypes, gc, sys, threading, time
import jax
from lizard_jax.convert.load import load_hf
from lizard_jax.convert.flax_dir import save_flax, load_flax
from lizard_jax.convert.save import save_hf

large, small, out = sys.argv[1:]
def memory():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * 4096
def settle():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory()
def watch():
    global peak
    while True:
        peak = max(peak, memory())
        time.sleep(0.001)
def measure(name, work, held):
    global peak
    before = peak = settle()
    result = work()
    print(name, held + (peak - before) / 1e6, flush=True)
    return result
peak = 0
threading.Thread(target=watch, daemon=True).start()
for source, to in ((small, out + "/warm"), (large, out + "/cold")):
    model = measure("load_hf", lambda: load_hf(source), 0)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 1e6
    measure("save_flax", lambda: save_flax(model, to + "_flax", source=source), held)
    measure("save_hf", lambda: save_hf(model, to + "_hf", source=source), held)
    del model
    model = measure("load_flax", lambda: load_flax(to + "_flax"), 0)
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_stays_near_the_target_and_a_tensor(tmp_path):
    """216 MB of weights, no tensor above 17: the peak above the weights is a few tensors in each direction.

    Reading holds a tensor as stored, turned, and as it becomes the model's; Orbax adds buffers of its own.
    """
    hf.make("Llama", tmp_path / "small")
    hf.make(
        "Llama", tmp_path / "large", vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3,
        num_attention_heads=8,
    )  # fmt: skip
    size = (tmp_path / "large" / "model.safetensors").stat().st_size / 1e6
    assert size > 190
    command = [sys.executable, "-c", MEMORY, tmp_path / "large", tmp_path / "small", tmp_path]
    # Freed arrays go back to the system at once, so that memory held is memory used.
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    peaks = {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    for name, peak in peaks.items():
        tensors = (peak - size) / 16.8
        assert tensors < 5, f"{name} held {tensors:.1f} tensors beside the model"
