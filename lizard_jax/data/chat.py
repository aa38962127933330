"""A chat record through the tokenizer's own template, and where its answers lie.

A template may mark the answers itself (``{% generation %}``); then its word holds. Otherwise they are found by
rendering prefixes of the conversation: an answer begins where the conversation before it, with the generation prompt,
ends, and stops with its end-of-turn token.
"""

import re
from typing import Any

from lizard_jax.data.text import Document, Spans
from lizard_jax.errors import UserError

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")


def chat_document(row: Any, where: str, tokenizer: Any, *, answers: bool) -> Document:
    """The rendered conversation ``row["messages"]``, with its answers' spans if ``answers`` asks for them.

    EOS is added at the end only where the template closes its turns with no special token at all.

    Raises:
        UserError: no chat template; ``messages`` missing or not a list of objects with string ``role`` and ``content``;
            a conversation the template refuses; answers that cannot be told from the rest.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{where} is a chat, but the tokenizer {tokenizer.name_or_path or '?'} has no chat template; "
            f"use a chat model's tokenizer, or Alpaca records"
        )
    messages = _messages(row, where)
    text = _render(tokenizer, messages, where)
    ends_with_answer = messages[-1]["role"] == "assistant"
    # By what the rendering ends with, not by where its words are found: an answer may be empty, or rewritten.
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    closed = any(text.rstrip().endswith(token) for token in special | set(tokenizer.all_special_tokens))
    spans: Spans = ()
    if answers:
        template = tokenizer.chat_template
        marked = isinstance(template, str) and _MARKS_ANSWERS.search(template)
        spans = _marked(tokenizer, messages) if marked else _found(tokenizer, messages, text, where)
        if not spans:
            raise UserError(f"{where} has no assistant message to score; drop it or set answer_only=false")
    return Document(text, answers=spans, open_end=ends_with_answer and not closed)


def _messages(row: Any, where: str) -> list[dict[str, str]]:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} is not a chat: it lacks a non-empty list 'messages'")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where} is not a chat: message {i + 1} lacks a string 'role' or 'content'")
    return messages


def _render(tokenizer: Any, messages: list[dict[str, str]], where: str, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    # A template raises through jinja for what it refuses, and fails in any other way where it is careless.
    except Exception as error:
        raise UserError(f"the chat template refuses {where}: {str(error).strip() or type(error).__name__}") from None


def _marked(tokenizer: Any, messages: list[dict[str, str]]) -> Spans:
    """The spans of the tokens that the template itself marks."""
    encoded = tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans: list[tuple[int, int]] = []
    before = False
    for (a, b), mark in zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True):
        if mark and before:
            spans[-1] = (spans[-1][0], int(b))
        elif mark:
            spans.append((int(a), int(b)))
        before = bool(mark)
    return tuple(spans)


def _found(tokenizer: Any, messages: list[dict[str, str]], text: str, where: str) -> Spans:
    """The spans of the assistant's messages in ``text``, by comparing renderings of the conversation's prefixes.

    A template may treat the last turn otherwise than earlier ones, so a prefix's rendering need not be a prefix of
    ``text``: each answer is looked for from where the two part.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # A template may refuse to render nothing at all, when the assistant speaks first.
        before = _render(tokenizer, messages[:i], where, prompt=True) if i else ""
        after = _render(tokenizer, messages[: i + 1], where)
        content = message["content"].strip()
        start = _common(text, before)
        found = text.find(content, start)
        if found < 0:
            raise UserError(
                f"{where}: the template renders message {i + 1} so that its answer cannot be found; "
                f"mark answers in the template with {{% generation %}}, or set answer_only=false"
            )
        # Where the rendering goes on as promised, all that follows the generation prompt is the answer.
        start = start if start == len(before) and i else found
        end = max(found + len(content), len(text[: _common(text, after)].rstrip()))
        spans.append((start, end))
    return tuple(spans)


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
