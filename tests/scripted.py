"""A tiny Llama whose greedy text is known, for tests of what happens around a model.

Behind ``a`` comes ``b``, then ``c``, then ``<|im_end|>``, then ``x y z x y z …``; behind anything else ``a``.
Its tokenizer has the 256 bytes and three special tokens, and the ChatML template; EOS is ``<|endoftext|>``, and
``<|im_end|>`` ends a text by generation_config.json alone.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 258
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB, WIDTH = 260, 264
"""One id more than the tokenizer has, and the width to the next multiple of what heads need."""


def scripted(directory: Path, *, chat_template: str | None = CHATML, **config: object) -> Path:
    """Writes the checkpoint into ``directory`` and returns it; ``config`` overrides entries of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0])
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)

    head = np.zeros((VOCAB, WIDTH), np.float32)
    follows = dict.fromkeys(range(VOCAB), "a") | {"a": "b", "b": "c", "x": "y", "y": "z", "z": "x"}
    ids = {letter: backend.token_to_id(letter) for letter in "abcxyz"}
    for before, after in follows.items():
        head[ids[after], ids.get(before, before) if isinstance(before, str) else before] += 1.0
    for before in ("a", "b", "c", "x", "y", "z"):  # their own successor outweighs the common one
        head[ids["a"], ids[before]] = 0.0
    head[END, ids["c"]] = 1.0
    head[ids["x"], END], head[ids["a"], END] = 1.0, 0.0
    zeros = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (32, WIDTH), "mlp.up_proj": (32, WIDTH),
        "mlp.down_proj": (WIDTH, 32),
    }  # fmt: skip
    tensors = {f"model.layers.0.{name}.weight": np.zeros(shape, np.float32) for name, shape in zeros.items()}
    for norm in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{norm}.weight"] = np.ones(WIDTH, np.float32)
    tensors["model.embed_tokens.weight"] = np.eye(VOCAB, WIDTH, dtype=np.float32)
    tensors["lm_head.weight"] = head
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "float32", "eos_token_id": 256,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(settings | config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, END]}))
    return directory
