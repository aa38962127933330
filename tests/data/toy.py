"""A small tokenizer of single characters, with a chat template, for exact expectations."""

import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, TURN = 0, 1, 2
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<turn>' }}{% endgeneration %}{% else %}{{ m['content'] + '<turn>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def character_tokenizer(*, bos: bool = True, eos: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character: ``<s>`` 0, ``</s>`` 1, ``<turn>`` 2, then ``CHARACTERS``."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<turn>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<turn>", "<unk>")])
    single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>"],
        chat_template=template,
    )


VOCAB_SIZE = 4 + len(CHARACTERS)


def write(path: Path, text: str) -> str:
    """Write ``text`` and give the path back as the config wants it."""
    path.write_text(text, encoding="utf-8")
    return str(path)
