"""From what a user types to token ids, by the checkpoint's own tokenizer, template and end tokens."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lizard_jax.convert.files import read_json
from lizard_jax.data.template import rendered
from lizard_jax.data.text import affixes, check_unicode, load_tokenizer
from lizard_jax.errors import UserError


@functools.lru_cache(maxsize=4)
def text_tokenizer(source: str) -> Any:
    """The tokenizer of a checkpoint, read once."""
    return load_tokenizer(source)


def encode(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text, behind what the tokenizer puts in front of one (``special``), without what it appends.

    Raises:
        UserError: the text is no Unicode.
    """
    check_unicode(text, "the prompt")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    head = affixes(tokenizer)[0] if special else []
    return [*(head if ids[: len(head)] != head else []), *ids]


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Refuses tokens that a model does not have; ``what`` names the text they are of.

    Raises:
        UserError: there is one.
    """
    odd = [token for token in ids if not 0 <= token < vocab_size]
    if odd:
        raise UserError(
            f"vocabulary mismatch: {what} holds token id {max(odd, key=abs)}, but the model's vocabulary has "
            f"{vocab_size} entries; use the model's own tokenizer"
        )


def special_stops(tokenizer: Any, stops: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Of stop strings, the ids of those that are a special token (and white space), and the others."""
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {stop: special[stop.strip()] for stop in stops if stop.strip() in special}
    return tuple(ends.values()), tuple(stop for stop in stops if stop not in ends)


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """The conversation in the tokenizer's template, up to where the assistant's answer begins.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; give a plain --prompt without --chat")
    try:
        return rendered(tokenizer, list(messages), tokenize=False, add_generation_prompt=True)
    # A template raises through jinja for what it refuses, and fails in any other way where it is careless.
    except Exception as error:
        raise UserError(f"the chat template refuses these messages: {error}") from None


def next_turn(tokenizer: Any, messages: Sequence[dict[str, str]], pending: int) -> str | None:
    """What the template puts between the answer that was written last and the next one.

    Args:
        messages: the conversation: …, assistant, user.
        pending: the token that the answer ended with. If it is the template's own end of a turn, it stands already.

    Returns:
        The text to go on with, or None where the template does not keep what was written (some drop or rewrite earlier
        answers): then the conversation has to be read anew.
    """
    so_far = chat_prompt(tokenizer, messages[:-2]) + messages[-2]["content"]
    whole = chat_prompt(tokenizer, messages)
    if not whole.startswith(so_far):
        return None
    return whole[len(so_far) :].removeprefix(tokenizer.decode([pending], skip_special_tokens=False))


def end_tokens(source: str, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's EOS, and those that generation_config.json or config.json name.

    Raises:
        UserError: a file that cannot be read, or names something else than ids.
    """
    found = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        file = Path(source).expanduser() / name
        if file.is_file():
            named = read_json(file).get("eos_token_id")
            named = named if isinstance(named, list) else [named]
            if not all(token is None or type(token) is int for token in named):
                raise UserError(f"{file}: eos_token_id is {named}; it must be a token id or a list of them")
            found += named
    return tuple(sorted({int(token) for token in found if token is not None}))


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Records of a JSONL file, each with ``prompt`` or ``messages``.

    Raises:
        UserError: it is missing, empty, or a line is no such record.
    """
    file = Path(path).expanduser()
    try:
        # Lines end where JSONL ends them: U+2028 and its like may stand inside a string.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {file}: {getattr(error, 'strerror', None) or error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise UserError(
                f"{file}:{number} is not JSON; each line is an object with 'prompt' or 'messages'"
            ) from None
        text = isinstance(record, dict) and isinstance(record.get("prompt"), str)
        if not text and not (isinstance(record, dict) and isinstance(record.get("messages"), list)):
            raise UserError(f"{file}:{number} has neither a string 'prompt' nor a list 'messages'")
        records.append(record)
    if not records:
        raise UserError(f"{file} holds no prompts")
    return records
