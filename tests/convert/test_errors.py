"""Bad checkpoints and bad places: one clear line, exit code 2, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from safetensors.torch import load_file, save_file

from lizard_jax.config import LizardConfig
from lizard_jax.convert import __main__ as convert
from lizard_jax.convert import weights
from lizard_jax.convert.files import appearing, read_json, write_json
from lizard_jax.convert.flax_dir import load_flax, save_flax
from lizard_jax.convert.load import load_hf
from lizard_jax.convert.save import save_hf
from lizard_jax.errors import UserError
from tests.models import hf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("llama") / "hf"
    hf.make("Llama", directory)
    return directory


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


def change_config(directory: Path, **changes) -> None:
    write_json(directory / "config.json", read_json(directory / "config.json") | changes)


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    code = convert.main()
    return code, capsys.readouterr().err


@pytest.mark.parametrize("command", ["hf2flax", "flax2hf"])
def test_the_command_line_says_it_in_one_line(command, llama, tmp_path, monkeypatch, capsys):
    cases = {tmp_path / "nowhere": "does not exist", tmp_path: "it has no"}
    if command == "flax2hf":
        cases[llama] = "no Flax directory"
    for source, words in cases.items():
        code, told = run(monkeypatch, capsys, command, source, tmp_path / "out")
        assert code == 2
        last = told.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert words in last
        assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    code, told = run(monkeypatch, capsys, command, llama, tmp_path / "taken")
    assert (code, told.count("\n")) == (2, 1)
    assert "exists and is not empty" in told
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["thesis.txt"]


def test_a_hub_name_that_cannot_be_had(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, told = run(monkeypatch, capsys, "hf2flax", "nobody/nothing", tmp_path / "out")
    assert (code, told.count("\n")) == (2, 1)
    assert "nobody/nothing is no directory here" in told


def test_a_file_is_not_a_directory(llama):
    with pytest.raises(UserError, match="is a file"):
        load_hf(llama / "model.safetensors")


def test_every_odd_tensor_is_named_at_once(broken):
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 5)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_hf(broken)
    message = str(caught.value)
    assert "\n" not in message
    for words in (
        "missing: ", "model.layers.1.mlp.up_proj.weight", "model.norm.weight",
        "unexpected: model.layers.7.mlp.up_proj.weight",
        "misshapen: model.layers.0.self_attn.q_proj.weight [3, 5] instead of [32, 32]",
        "of an unsupported dtype: lm_head.weight I8",
    ):  # fmt: skip
        assert words in message


def test_float64_is_read_only_where_it_is_narrowed(broken):
    tensors = {name: tensor.double() for name, tensor in load_file(broken / "model.safetensors").items()}
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"unsupported dtype: .*F64"):
        load_hf(broken)
    assert load_hf(broken, dtype="float32").embed.embedding.dtype == jnp.float32


def test_a_tied_head_that_differs_is_refused(broken):
    change_config(broken, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_hf(broken)


@pytest.mark.parametrize("keep", [4, 100, 3000, -1], ids=["in_length", "in_header", "in_data", "last_byte"])
def test_a_truncated_file_is_named(keep, broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors .*truncated"):
        load_hf(broken)


def test_a_corrupt_header_is_named(broken):
    file = broken / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:12] = b"!!!!"
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors has a corrupt safetensors header"):
        load_hf(broken)


def test_a_missing_shard_is_named(broken):
    os.rename(broken / "model.safetensors", broken / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks the shards model-00002-of-00002"):
        load_hf(broken)


def test_no_weights_and_no_config(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model"):
        load_hf(broken)
    (broken / "config.json").write_text("{ no json")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_hf(broken)
    (broken / "config.json").unlink()
    with pytest.raises(UserError, match="not a checkpoint: it has no config"):
        load_hf(broken)


class Surprise:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_bin_files_run_nothing_and_need_torch(broken, monkeypatch, capsys):
    (broken / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Surprise()}, broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="is truncated or holds more than weights"):
        load_hf(broken)
    assert "must not run" not in capsys.readouterr().out
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="extra torch"):
        load_hf(broken)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "laplace"}, "hidden_act 'laplace'"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "rope type 'proportional'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"vocab_size": 99}, r"embed_tokens.weight \[61, 32\] instead of \[99, 32\]"),
        ({"lizard": {"window": 8, "winodw": 9}}, "unknown settings: winodw"),
        ({"lizard": {"window": "wide"}}, "window='wide'; it must be of type int"),
        ({"lizard": {"memory": "all"}}, "counts the window's tokens twice"),
        ({"lizard": {}}, "lizard.safetensors is missing"),
    ],
)
def test_what_a_config_asks_and_we_have_not_is_named(changes, words, broken):
    change_config(broken, **changes)
    with pytest.raises(UserError, match=words) as caught:
        load_hf(broken)
    assert str(broken) in str(caught.value)


def test_new_modules_that_do_not_fit_are_named(llama, tmp_path):
    model = load_hf(llama, attention=LizardConfig(window=8, chunk=4, meta="sink"))
    save_hf(model, tmp_path / "out", source=llama)
    raw = read_json(tmp_path / "out" / "config.json")
    change_config(tmp_path / "out", lizard=raw["lizard"] | {"state_heads": "query", "meta": "none"})
    with pytest.raises(UserError, match=r"lizard\.safetensors does not fit.*unexpected: .*sink.*misshapen: .*phi_k"):
        load_hf(tmp_path / "out")


def test_a_damaged_flax_directory(llama, tmp_path):
    save_flax(load_hf(llama), tmp_path / "flax", source=llama)
    for file in (tmp_path / "flax" / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UserError, match=r"params is damaged or incomplete: .* is not as it was written"):
        load_flax(tmp_path / "flax")
    shutil.rmtree(tmp_path / "flax" / "params")
    with pytest.raises(UserError, match="params is damaged or incomplete"):
        load_flax(tmp_path / "flax")


def test_the_source_must_be_the_models_own(llama, tmp_path):
    hf.make("Llama", tmp_path / "other", hidden_size=16)
    with pytest.raises(UserError, match="describes another model"):
        save_hf(load_hf(llama), tmp_path / "out", source=tmp_path / "other")
    with pytest.raises(UserError, match="carries no LoRA"):
        save_hf(load_hf(llama), tmp_path / "out", source=llama, adapter=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other"]


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # what it compiles would be cut short, and not told
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.parametrize("command", ["hf2flax", "flax2hf"])
def test_a_full_disk_leaves_nothing(command, llama, tmp_path):
    """A limit on the size of files stands for the full disk: writing past it fails in the same place."""
    source = llama
    if command == "flax2hf":
        source = tmp_path / "flax"
        save_flax(load_hf(llama), source, source=llama)

    command = [sys.executable, "-c", LIMITED, str(ROOT / "convert.py"), command, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'out'}: ")
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ([source.name] if source.parent == tmp_path else [])


def test_too_little_space_is_known_beforehand(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5000, 5000))
    for save in (save_hf, save_flax):
        with pytest.raises(UserError, match=r"it takes 0.000 GB and 0.000 GB are free"):
            save(load_hf(llama), tmp_path / "out", source=llama)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_appears_whole_or_not(tmp_path):
    def fail() -> None:
        with appearing(tmp_path / "deep" / "out") as directory:
            (directory / "half").write_text("written")
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        fail()
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "deep" / "out").mkdir()
    with appearing(tmp_path / "deep" / "out") as directory:
        (directory / "whole").write_text("written")
        assert list((tmp_path / "deep" / "out").iterdir()) == []
    assert [file.name for file in (tmp_path / "deep" / "out").iterdir()] == ["whole"]


def test_what_appears_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    reached = set()
    monkeypatch.setattr("os.fsync", lambda handle: reached.add(os.fstat(handle).st_ino))
    with appearing(tmp_path / "out") as directory:
        (directory / "deep").mkdir()
        (directory / "deep" / "file").write_text("written")
    written = {path.stat().st_ino for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert len(written) == 3
    assert written | {tmp_path.stat().st_ino} <= reached


def test_a_hub_id_brings_safetensors_or_else_bin(monkeypatch, tmp_path):
    """What is asked of the hub, with a stand-in for the download."""
    from lizard_jax.convert.files import locate

    asked: list[list[str]] = []

    def download(repository: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("owner/name") == tmp_path
    assert "model*.safetensors" in asked[0]
    assert "pytorch_model*.bin" not in asked[0]
    assert "pytorch_model*.bin" in asked[1]
    (tmp_path / "model.safetensors").touch()
    locate("owner/name")
    assert len(asked) == 3
