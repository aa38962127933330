"""Text from a loaded model in one call."""

from collections.abc import Sequence
from typing import Any

from lizard_jax.generate.engine import Generation
from lizard_jax.generate.prompts import chat_prompt, encode, end_tokens, text_tokenizer
from lizard_jax.generate.sampling import Sampling


def generate(
    model: Any,
    prompt: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    **sampling: Any,
) -> str | list[str]:
    """The continuation of a prompt, or of each of several in one batch, without the prompt itself.

    Args:
        max_new_tokens: most tokens written for each prompt.
        stop: a string that ends the text, or several; they are not part of it.
        chat: the prompt is a user's message, put into the tokenizer's chat template.
        sampling: fields of ``Sampling``: ``temperature`` (0, the default, is greedy), ``top_k``, ``top_p``, ``min_p``,
            ``repetition_penalty``, ``seed``.

    Raises:
        UserError: an empty prompt, a value out of range, or no tokenizer beside the model.
    """
    tokenizer = text_tokenizer(model.source)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if chat:
        ids = [
            encode(tokenizer, chat_prompt(tokenizer, [{"role": "user", "content": x}]), special=False) for x in texts
        ]
    else:
        ids = [encode(tokenizer, text) for text in texts]
    run = Generation(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, sampling=Sampling(**sampling), stops=stop,
        eos=end_tokens(model.source, tokenizer),
    )  # fmt: skip
    for _ in run.pieces():
        pass
    written = [row.text for row in run.rows]
    return written[0] if isinstance(prompt, str) else written
