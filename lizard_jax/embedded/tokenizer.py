"""The embedded teacher's tokenizer: byte-level BPE trained on the embedded training text.

``python -m lizard_jax.embedded.tokenizer DST`` writes it into the directory DST, in HF format. Training is
deterministic, so the same Python patch release gives the same files.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lizard_jax.embedded.corpus import documents
from lizard_jax.errors import UserError

VOCAB_SIZE = 1024
# Spelled so that they occur in no source file: `<s>` does, as the name of a regex group.
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

# What a merge may not cross. A word takes along the one character before it (a space, a dot, an underscore); digits
# stand alone; a line end takes the whole indentation that follows, so that a change of depth is one token.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n *|\s+"


def train(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of ``VOCAB_SIZE`` tokens learned from ``texts``. It starts every encoding with BOS.

    Every byte is a token, so nothing is unknown and decoding gives the text back exactly.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write ``tokenizer`` into ``directory`` as the three files transformers reads.

    Raises:
        UserError: the directory cannot be written.
    """
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {
        **special,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            part = directory / (name + ".part")
            part.write_text(text + "\n", encoding="utf-8", newline="\n")
            part.replace(directory / name)
    except OSError as error:
        raise UserError(f"cannot write the tokenizer into {directory}: {error.strerror or error}") from None


def main() -> int:
    """Train on the embedded text and write into the directory named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("error: usage: python -m lizard_jax.embedded.tokenizer DST", file=sys.stderr)
        return 2
    try:
        save(train(documents("train")), Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
