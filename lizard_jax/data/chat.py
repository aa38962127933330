"""A chat record through the tokenizer's own template, and where its answers lie.

A template may mark the answers itself (``{% generation %}``); then its word holds. Otherwise they are found by
rendering prefixes of the conversation: an answer begins where the conversation before it, with the generation prompt,
ends, and stops with its end-of-turn token.
"""

import functools
import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

from lizard_jax.data.template import rendered
from lizard_jax.data.text import Document, Spans
from lizard_jax.errors import UserError

_UNHEARD_OF = "\u241f\u241e\u241d"
# transformers hands a template its own clock and lets nobody set it.
_NOW = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")


def chat_document(row: Any, where: str, tokenizer: Any, *, answers: bool, date: str = "") -> Document:
    """The rendered conversation ``row["messages"]``, with its answers' spans if ``answers`` asks for them.

    A column ``tools`` (a list, or one as JSON) is handed to the template. EOS is added at the end only where the
    template closes its turns with no special token at all.

    Args:
        date: what a template that asks for the time is told, as ``2026-11-25``; empty: now.

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
    options: dict[str, Any] = {"tools": tools} if (tools := _tools(row, where)) else {}
    if date and _NOW.search(template := tokenizer.get_chat_template(tools=tools or None)):
        day = datetime.fromisoformat(date)
        options["chat_template"] = _NOW.sub(lambda call: repr(day.strftime(call[2])), template)
    render = functools.partial(_render, tokenizer, where=where, options=options)
    text = render(messages)
    ends_with_answer = messages[-1]["role"] == "assistant"
    # By what the rendering ends with, not by where its words are found: an answer may be empty, or rewritten.
    closed = _closing(text, tokenizer) is not None
    spans: Spans = ()
    if answers:
        template = tokenizer.chat_template
        marked = isinstance(template, str) and _MARKS_ANSWERS.search(template)
        spans = _marked(tokenizer, messages, options) if marked else _found(tokenizer, messages, text, where, render)
        if not spans:
            raise UserError(f"{where} has no assistant message to score; drop it or set answer_only=false")
    return Document(text, answers=spans, open_end=ends_with_answer and not closed)


def _messages(row: Any, where: str) -> list[dict[str, Any]]:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} is not a chat: it lacks a non-empty list 'messages'")
    for i, message in enumerate(messages):
        if isinstance(message, dict) and message.get("tool_calls") and message.get("content") is None:
            continue  # a turn that only calls tools may say nothing
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where} is not a chat: message {i + 1} lacks a string 'role' or 'content'")
    return messages


def _tools(row: Any, where: str) -> list[Any]:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise UserError(f"{where}: 'tools' is neither a list nor JSON of one") from None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where}: 'tools' is neither a list nor JSON of one")
    return tools or []


def _render(
    tokenizer: Any, messages: list[dict[str, Any]], *, where: str, options: dict[str, Any], prompt: bool = False
) -> str:
    try:
        return rendered(tokenizer, messages, tokenize=False, add_generation_prompt=prompt, **options)
    # A template raises through jinja for what it refuses, and fails in any other way where it is careless.
    except Exception as error:
        raise UserError(f"the chat template refuses {where}: {str(error).strip() or type(error).__name__}") from None


def _closing(text: str, tokenizer: Any) -> str | None:
    """The special token that a rendering ends with, white space aside."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = [token for token in special | set(tokenizer.all_special_tokens) if text.rstrip().endswith(token)]
    return max(ends, key=len, default=None)


def _marked(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> Spans:
    """The spans of the tokens that the template itself marks."""
    encoded = rendered(
        tokenizer,
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **options,
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


def _found(tokenizer: Any, messages: list[dict[str, Any]], text: str, where: str, render: Callable[..., str]) -> Spans:
    """The spans of the assistant's messages in ``text``, by comparing renderings of the conversation's prefixes.

    A template may treat the last turn otherwise than earlier ones, so a prefix's rendering need not be a prefix of
    ``text``: each answer is looked for from where the two part, and ends with the token that closes its turn.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i:
            before = render(messages[:i], prompt=True)
            start = _common(text, before)
            promised = start == len(before)
        else:
            # Nothing to render before it: where the rendering of another first answer parts from this one.
            other = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": _UNHEARD_OF}
            start, promised = _common(text, render([other, *messages[1:]])), True
        after = render(messages[: i + 1])
        content = (message.get("content") or "").strip()
        found = text.find(content, start)
        close = _closing(after, tokenizer)
        if found < 0 and not (promised and close):
            raise UserError(
                f"{where}: the template renders message {i + 1} so that its answer cannot be found; "
                f"mark answers in the template with {{% generation %}}, or set answer_only=false"
            )
        # Where the rendering goes on as promised, all that follows the generation prompt is the answer.
        start = start if promised else found
        said = found + len(content) if found >= 0 else start
        end = text.find(close, said) + len(close) if close and close in text[said:] else said
        spans.append((start, max(end, len(text[: _common(text, after)].rstrip()))))
    return tuple(spans)


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
