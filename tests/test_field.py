"""What bug reports of tools for this job complain of, tried here: each with the right value."""

import io
import json
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lizard_jax
from lizard_jax.atomic import finite
from lizard_jax.config import DataConfig, LizardConfig
from lizard_jax.convert.files import carry
from lizard_jax.convert.hf_config import model_config
from lizard_jax.convert.load import load_hf
from lizard_jax.data import template
from lizard_jax.data.records import documents
from lizard_jax.data.text import Document, affixes, load_tokenizer, tokenize
from lizard_jax.errors import UserError
from lizard_jax.generate.__main__ import main
from lizard_jax.lora import merged_kernel
from tests.scripted import END, scripted


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lizard_jax.load(scripted(tmp_path_factory.mktemp("scripted") / "model"))


def changed(directory, name, **entries):
    """config.json, or another JSON file, with these entries."""
    file = directory / name
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return directory


# ------------------------------------------------------------------------------------------------ generation


def test_the_script(model):
    assert model.generate("a", max_new_tokens=8) == "bc"
    assert model.generate("x", max_new_tokens=5) == "yzxyz"
    assert model.generate("hello", chat=True, max_new_tokens=8) == "abc"


def test_a_hub_id_is_read_as_its_directory(tmp_path, monkeypatch):
    place = scripted(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(place))
    assert lizard_jax.load("somebody/scripted").generate("a", max_new_tokens=8) == "bc"


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|im_end|>\n", ["nothing", "<|im_end|>"]])
def test_a_special_token_stops_a_text(tmp_path, stop):
    place = scripted(tmp_path / "model")
    (place / "generation_config.json").unlink()
    other = lizard_jax.load(place)
    assert other.generate("a", max_new_tokens=8) == "bcxyzxy"
    assert other.generate("a", max_new_tokens=8, stop=stop) == "bc"


def test_one_stop_string_is_one(model):
    assert model.generate("x", max_new_tokens=9, stop="zx") == "y"
    assert model.generate("x", max_new_tokens=9, stop=["zx"]) == "y"


def test_nothing_to_go_on_from_is_one_line(model):
    with pytest.raises(UserError, match="there is no prompt"):
        model.generate([])
    with pytest.raises(UserError, match="prompt 2 is empty"):
        model.generate(["a", ""])


def test_a_cache_beyond_the_memory_is_refused_before_it_is_made(model):
    with pytest.raises(
        UserError, match=r"the state of 1 rows of 2,147,483,648 tokens takes [\d,.]+ GB of a device, and there are"
    ):
        model.generate("a", max_new_tokens=2**31 - 100)


def test_tokens_a_model_does_not_have_are_refused(tmp_path):
    place = scripted(tmp_path / "model")
    tensors = load_file(place / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100]
    save_file(tensors, place / "model.safetensors")
    small = lizard_jax.load(changed(place, "config.json", vocab_size=100))
    with pytest.raises(UserError, match=r"prompt 1 holds token id .*, but the model's vocabulary has 100"):
        small.generate("ü", max_new_tokens=2)


@pytest.mark.parametrize("where", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_no_text_is_made_of_logits_that_are_not_finite(tmp_path, where, capsys):
    place = scripted(tmp_path / "model")
    tensors = load_file(place / "model.safetensors")
    tensors[where] = np.full_like(tensors[where], np.nan)
    save_file(tensors, place / "model.safetensors")
    assert main([str(place), "--prompt", "a", "--max-new-tokens", "4"]) == 2
    message = capsys.readouterr().err
    named = {"lm_head.weight": "lm_head/kernel", "model.layers.0.mlp.up_proj.weight": "layers/0/mlp/up_proj/kernel"}
    assert f"its parameter {named[where]} holds NaN or infinity" in message
    # Parameters that are finite each, and overflow together.
    sound = scripted(tmp_path / "sound")
    tensors = load_file(sound / "model.safetensors")
    tensors["lm_head.weight"] *= 3e38
    save_file(tensors, sound / "model.safetensors")
    assert main([str(sound), "--prompt", "a", "--max-new-tokens", "4"]) == 2
    assert "not finite, though its parameters are" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [1e-38, 5e-7, -1.0, float("nan"), float("inf")])
def test_temperatures_that_cannot_be_divided_by(model, temperature):
    with pytest.raises(UserError, match=r"temperature is .*, must be 0 \(greedy\) or 1e-6 or more"):
        model.generate("a", temperature=temperature)


def test_the_smallest_temperature_is_greedy(model):
    assert model.generate("x", max_new_tokens=5, temperature=1e-6) == "yzxyz"


# ------------------------------------------------------------------------------------------ what is typed and read


def test_lines_of_prompts_end_as_jsonl_does(tmp_path, capsys):
    place = scripted(tmp_path / "model")
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"one{odd}x"}, ensure_ascii=False) for odd in ("\u2028", "\x85", "\x0c")]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert main([str(place), "--prompts", str(file), "--max-new-tokens", "3"]) == 0
    assert [json.loads(line)["continuation"] for line in capsys.readouterr().out.split("\n") if line] == ["yzx"] * 3


def test_half_a_surrogate_pair_is_one_line(tmp_path, capsys):
    place = scripted(tmp_path / "model")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a\\ud800"}\n')
    for given in (["--prompts", str(file)], ["--prompt", "a\ud800"]):
        assert main([str(place), *given]) == 2
        assert "the prompt holds '\\ud800' at character 1, half of a surrogate pair" in capsys.readouterr().err
    with pytest.raises(UserError, match="document 2 of here holds"):
        tokenize(
            [Document("ab"), Document("c\udfff")], load_tokenizer(place), source="here", vocab_size=300
        )  # fmt: skip


def test_an_output_without_the_letters_loses_nothing(tmp_path, monkeypatch):
    place = scripted(tmp_path / "model")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main([str(place), "--prompt", "ü", "--max-new-tokens", "3"]) == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"\\xfcabc\n"


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"{", b'{"eos_token_id": "x"}', b'{"eos_token_id": [true]}'])
def test_a_damaged_generation_config_is_one_line(tmp_path, content, capsys):
    place = scripted(tmp_path / "model")
    (place / "generation_config.json").write_bytes(content)
    assert main([str(place), "--prompt", "a"]) == 2
    message = capsys.readouterr().err
    assert "generation_config.json" in message
    assert message.count("\n") == 1


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_whole_file_comes_before_an_index_left_over(tmp_path):
    place = scripted(tmp_path / "model")
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    assert lizard_jax.load(place).generate("a", max_new_tokens=8) == "bc"


def test_a_tied_head_under_its_other_name(tmp_path):
    place = changed(scripted(tmp_path / "model"), "config.json", tie_word_embeddings=True)
    tensors = load_file(place / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, place / "model.safetensors")
    loaded = load_hf(place)
    assert loaded.lm_head is None
    assert np.array_equal(loaded.embed.embedding[...], tensors["lm_head.weight"])


@pytest.mark.parametrize("added", [{"rope_type": "linear", "factor": 4.0}, {"type": "dynamic", "factor": 2.0}])
def test_rope_scaling_that_was_added_counts_as_in_transformers(tmp_path, added):
    from transformers import AutoConfig

    place = scripted(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    changed(place, "config.json", rope_scaling=added)
    theirs = AutoConfig.from_pretrained(place).rope_parameters
    ours = model_config(json.loads((place / "config.json").read_text())).rope
    assert (ours.kind, ours.factor, ours.theta) == (theirs["rope_type"], theirs["factor"], theirs["rope_theta"])


@pytest.mark.parametrize(
    ("setting", "value"), [("final_logit_softcapping", 30.0), ("attention_multiplier", 0.2), ("num_experts", 8)]
)
def test_settings_of_other_decoders_are_refused(tmp_path, setting, value):
    place = scripted(tmp_path / "model", **{setting: value})
    with pytest.raises(UserError, match=f"config.json has {setting}={value}, which no llama decoder"):
        load_hf(place)
    scripted(tmp_path / "neutral", final_logit_softcapping=None, logits_scaling=1.0, num_experts=0)
    load_hf(tmp_path / "neutral")


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("rms_norm_eps", -1.0, "rms_norm_eps=-1.0: input should be greater than 0"),
        ("tie_word_embeddings", "false", "tie_word_embeddings=false: input should be a valid boolean"),
        ("hidden_size", "264", "hidden_size=264: input should be a valid integer"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000: input should be less than or equal to 10000"),
        ("rope_scaling", [1], "rope_scaling=[1]: input should be a valid dictionary"),
    ],
)
def test_config_json_is_not_believed_as_typed(tmp_path, setting, value, words):
    place = scripted(tmp_path / "model", **{setting: value})
    with pytest.raises(UserError) as caught:
        load_hf(place)
    assert f"config.json has {words}" in str(caught.value)


PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern={'q_proj': 2}"),
        ({"target_modules": ".*_proj"}, "target_modules='.*_proj', a pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"use_dora": True, "layers_to_transform": [0]}, "use_dora=True; layers_to_transform=[0]"),
        ({"r": 0}, "is no LoRA configuration: r is missing or no such value"),
        ({"lora_alpha": "8"}, "is no LoRA configuration: lora_alpha is missing"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path, setting, words):
    place = scripted(tmp_path / "model")
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(PLAIN | setting))
    with pytest.raises(UserError) as caught:
        load_hf(place)
    assert words in str(caught.value)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    place = scripted(tmp_path / "model")
    (place / "adapter").mkdir()
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 264)).astype(np.float32), rng.normal(size=(264, 4)).astype(np.float32)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format("A"): a, name.format("B"): b}, place / "adapter" / "adapter_model.safetensors")
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(PLAIN | {"use_rslora": True}))
    projection = load_hf(place).layers[0].attention.q_proj
    np.testing.assert_allclose(merged_kernel(projection), (8 / 4**0.5 * b @ a).T, rtol=1e-5, atol=1e-5)


def test_an_adapter_beside_the_model_is_not_left_out_silently(tmp_path):
    place = scripted(tmp_path / "model")
    (place / "adapter_config.json").write_text(json.dumps(PLAIN))
    with pytest.raises(UserError, match="merge it with PEFT first"):
        load_hf(place)


def test_no_file_from_elsewhere_is_carried_along(tmp_path):
    place = scripted(tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (place / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside the checkpoint"):
        carry(place, tmp_path)
    # The hub's cache is links too.
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0").write_text("tokens")
    (snapshot / "tokenizer.model").symlink_to(blobs / "0")
    (tmp_path / "out").mkdir()
    carry(snapshot, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.model").is_symlink()
    assert (tmp_path / "out" / "tokenizer.model").read_text() == "tokens"


def test_files_of_today_are_carried_along(tmp_path):
    there = ("additional_chat_templates/tools.jinja", "chat_template.json", "tekken.json", "USE_POLICY.md")
    for name in there:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(f"{{}} of {name}")
    (tmp_path / "model" / "model.safetensors").write_text("no side file")
    (tmp_path / "copy").mkdir()
    carry(tmp_path / "model", tmp_path / "copy")
    kept = {str(file.relative_to(tmp_path / "copy")): file.read_text() for file in (tmp_path / "copy").rglob("*.*")}
    assert kept == {name: f"{{}} of {name}" for name in there}


def test_a_tokenizers_own_code_is_not_run(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "odd.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Odd: pass\n")
    settings = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(UserError, match="no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
    assert not ran.exists()


def test_a_missing_prefix_is_not_a_list_of_every_tensor(tmp_path):
    place = scripted(tmp_path / "model")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(place / "model.safetensors").items()}
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(UserError, match="and 3 more") as caught:
        load_hf(place)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize(
    ("layers", "words"), [((99, -1), "softmax-layers names 99, -1, and the model has layers 0 to 0"),
                          ((0,), "softmax-layers names every layer")],
)  # fmt: skip
def test_layers_that_are_not_there_are_refused(tmp_path, layers, words):
    place = scripted(tmp_path / "model")
    with pytest.raises(UserError, match=words):
        load_hf(place, attention=LizardConfig(window=8, softmax_layers=layers))


# ------------------------------------------------------------------------------------------------ text


def chat(tokenizer, tmp_path, messages, **options):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}))
    return next(documents(DataConfig(path=str(file), **options), tokenizer))


@pytest.mark.parametrize("answer", ["", "<think>long</think>short", "ends <|im_end|>"])
def test_a_closed_turn_is_not_closed_again(tmp_path, answer):
    tokenizer = load_tokenizer(scripted(tmp_path / "model"))
    # As reasoning models' templates do: what was thought is dropped from the answer.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('</think>')[-1]"
    )
    document = chat(tokenizer, tmp_path, [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}])
    ids = tokenize([document], tokenizer, source="chat", vocab_size=300).tokens.tolist()
    assert not document.open_end
    assert ids[-2:] == [END, ids[-1]]
    assert 256 not in ids
    open_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = open_template
    assert chat(tokenizer, tmp_path, [{"role": "assistant", "content": "y"}]).open_end


def test_an_answer_the_template_marks_is_one_span(tmp_path):
    tokenizer = load_tokenizer(scripted(tmp_path / "model"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yz" * 50}] * 2
    document = chat(tokenizer, tmp_path, turns, answer_only=True)
    assert [document.text[a:b] for a, b in document.answers] == ["yz" * 50 + "<|im_end|>"] * 2


QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "look", "arguments": {}}}]


def test_answers_of_a_template_that_renders_the_last_turn_otherwise(tmp_path):
    tokenizer = load_tokenizer(scripted(tmp_path / "model"))
    tokenizer.chat_template = QWEN3
    turns = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two"}, {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": "seen"}, {"role": "assistant", "content": "done"},
    ]  # fmt: skip
    document = chat(tokenizer, tmp_path, turns, answer_only=True)
    assert [document.text[a:b] for a, b in document.answers] == [
        "yes<|im_end|>", "<tool_call>look</tool_call><|im_end|>", "<think>\n\n</think>\n\ndone<|im_end|>",
    ]  # fmt: skip


def test_a_first_answer_is_not_looked_for_in_the_system_prompt(tmp_path):
    tokenizer = load_tokenizer(scripted(tmp_path / "model"))
    tokenizer.chat_template = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + tokenizer.chat_template
    turns = [{"role": "assistant", "content": "You"}, {"role": "user", "content": "hm"}]
    document = chat(tokenizer, tmp_path, turns, answer_only=True)
    assert [document.text[a:b] for a, b in document.answers] == ["You<|im_end|>"]
    assert document.answers[0][0] > document.text.index("assistant.")


@pytest.mark.parametrize("given", [[{"name": "look"}], json.dumps([{"name": "look"}])])
def test_tools_reach_the_template(tmp_path, given):
    tokenizer = load_tokenizer(scripted(tmp_path / "model"))
    tokenizer.chat_template = "{% for t in tools or [] %}tool {{ t.name }}\n{% endfor %}" + tokenizer.chat_template
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": given}))
    text = next(documents(DataConfig(path=str(file)), tokenizer)).text
    assert text.startswith("tool look\n<|im_start|>user")
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": "{"}))
    with pytest.raises(UserError, match="'tools' is neither a list nor JSON of one"):
        next(documents(DataConfig(path=str(file)), tokenizer))


def test_a_template_that_asks_for_the_date_is_told_the_runs(tmp_path):
    tokenizer = load_tokenizer(scripted(tmp_path / "model"))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: " + tokenizer.chat_template
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for options in ({}, {"answer_only": True}):
        text = chat(tokenizer, tmp_path, turns, date="2024-02-29", **options).text
        assert text.startswith("29 Feb 2024: <|im_start|>")


def test_a_tokenizer_that_has_no_letter_a():
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "z": 1, "?": 2}, unk_token="?"))
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert affixes(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")) == ([0], [])
    bare = Tokenizer(models.BPE({"z": 0}, []))
    bare.add_special_tokens(["<s>"])
    bare.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert affixes(PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>")) == ([1], [])


def test_a_tokenizer_model_alone_is_told_what_to_do(tmp_path):
    place = scripted(tmp_path / "model")
    (place / "tokenizer.json").rename(place / "tokenizer.model")
    with pytest.raises(UserError, match=r"has tokenizer.model but no tokenizer.json, which is what is read here"):
        load_tokenizer(place)


def test_what_lies_beside_data_is_not_data(tmp_path):
    place = tmp_path / "set"
    (place / ".git").mkdir(parents=True)
    for name in ("README.md", "LICENSE.txt", ".git/x.txt"):
        (place / name).write_text("not data")
    (place / "dataset_infos.json").write_text('{"default": {}}')
    (place / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [d.text for d in documents(DataConfig(path=str(place)), None)] == ["one", "two"]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": "one"}, {"text": "two"}], indent=2),
        json.dumps({"data": [{"text": "one"}, {"text": "two"}]}),
        json.dumps({"version": 1, "data": [{"text": "one"}, {"text": "two"}]}, indent=2),
        '{"text": "one"}\n\n{"text": "two"}\n',
    ],
)
def test_json_as_it_is_found(tmp_path, content):
    file = tmp_path / "data.json"
    file.write_text(content)
    assert [d.text for d in documents(DataConfig(path=str(file)), None)] == ["one", "two"]
    file.write_text(json.dumps({"text": "alone"}, indent=2))
    assert [d.text for d in documents(DataConfig(path=str(file)), None)] == ["alone"]


# ------------------------------------------------------------------------------------------------ files


def test_a_device_stays_one_and_a_link_is_followed(tmp_path):
    import os
    import threading

    from lizard_jax.atomic import write_atomic

    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, "text")
    reader.join()
    assert read == [b"text"]
    assert pipe.is_fifo()
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "file")
    write_atomic(link, b"state")
    assert link.is_symlink()
    assert (tmp_path / "real" / "file").read_bytes() == b"state"
    write_atomic(tmp_path / "half", "a\ud800")
    assert (tmp_path / "half").read_bytes() == b"a\\ud800"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--steps=inf", "invalid whole number value|is not a whole number"),
        ("--steps=1e18", "steps 1000000000000000000 is out of range"),
        ("--seed=1e30", "seed .* is out of range"),
        ("--batch-size=1e9", "batch size 1000000000 is out of range"),
        ("--feature-half=1e12", "feature_half=1000000000000 must be 0"),
        ("--learning-rate=1e30", "learning rate 1e[+]30 is out of range"),
        ("--beta-start=nan", "beta_start=nan must be a finite number"),
        ("--date=yesterday", "date 'yesterday' is no day as 2026-11-25"),
    ],
)
def test_absurd_numbers_are_one_line_before_anything_is_made(flag, words, tmp_path, capsys):
    from lizard_jax.train.__main__ import main as train

    try:
        code = train(["--stage=1", f"--out={tmp_path / 'run'}", flag])
    except SystemExit as stopped:
        code = stopped.code
    message = capsys.readouterr().err
    assert code == 2
    assert message.count("\n") == 1
    assert re.search(words, message), message
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_finite_is_named_and_not_the_learning_rate(tmp_path, capsys):
    from lizard_jax.train.__main__ import main as train

    place = scripted(tmp_path / "model")
    tensors = load_file(place / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = np.nan
    save_file(tensors, place / "model.safetensors")
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>".join(["abc " * 60] * 20))
    line = "--stage=1 --sequence-length=32 --window=8 --chunk=8 --steps=2 --held-out=0.1 --held-out-tokens=64"
    argv = [*line.split(), f"--teacher={place}", f"--data={text}", f"--out={tmp_path / 'run'}"]
    assert train(argv) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "for the teacher's layers/0/mlp/down_proj/kernel holds NaN or infinity; its weights are damaged" in message
    assert "learning-rate" not in message


@pytest.mark.parametrize("command", ["perplexity", "passkey"])
def test_an_evaluation_names_what_is_not_finite(tmp_path, capsys, command):
    from lizard_jax.eval.__main__ import main as evaluate

    place = scripted(tmp_path / "model")
    tensors = load_file(place / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = np.inf
    save_file(tensors, place / "model.safetensors")
    (tmp_path / "text.txt").write_text("abc " * 60)
    more = {"perplexity": ["--data", str(tmp_path / "text.txt")], "passkey": ["--lengths", "1024", "--samples", "1"]}
    assert evaluate([command, str(place), *more[command], "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.endswith("is damaged: its parameter layers/0/mlp/down_proj/kernel holds NaN or infinity")
    assert not (tmp_path / "out" / "result.json").exists()


def test_no_result_holds_what_json_has_no_word_for():
    found = finite({"a": float("nan"), "b": [1.0, float("-inf")], "c": {"d": (2, "x")}})
    assert json.loads(json.dumps(found, allow_nan=False)) == {"a": None, "b": [1.0, None], "c": {"d": [2, "x"]}}


def test_a_template_that_loops_without_end_is_stopped(tmp_path, monkeypatch):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    place = scripted(tmp_path / "model", chat_template=endless)
    monkeypatch.setattr(template, "PATIENCE", 0.3)
    with pytest.raises(UserError, match=r"the chat template refuses these messages: it takes longer than 0\.3 seconds"):
        lizard_jax.load(place).generate("hello", chat=True)
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "abc"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="takes longer than"):
        list(documents(DataConfig(path=str(tmp_path / "chat.jsonl"), format="chat"), load_tokenizer(place)))


def test_a_full_disk_names_the_file_that_is_not_there_then(tmp_path, monkeypatch, capsys):
    from lizard_jax import atomic
    from lizard_jax.program import ended

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert ended(lambda: atomic.write_atomic(tmp_path / "run.json", "{}") or 0, interrupted="") == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'run.json'}: No space left on device\n"
    assert not list(tmp_path.iterdir())
