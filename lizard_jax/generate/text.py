"""Tokens to text as they come, and where a stop string ends it."""

from collections.abc import Sequence
from typing import Any


class Detokenizer:
    """Text of a growing list of tokens, given out as soon as it can no longer change.

    A character may take several tokens, and a token's text may depend on the one before it. So the last stretch is
    decoded again with what follows, and an unfinished character waits.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-8:])
        self._from = 0
        self._shown = len(self._ids)

    def add(self, tokens: Sequence[int]) -> str:
        """What the new tokens add; may be empty."""
        self._ids += tokens
        old, new = self._decode(self._ids[self._from : self._shown]), self._decode(self._ids[self._from :])
        if new.endswith("\ufffd") or len(new) <= len(old):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return new[len(old) :]

    def rest(self) -> str:
        """What is left at the end, unfinished characters included."""
        old, new = self._decode(self._ids[self._from : self._shown]), self._decode(self._ids[self._from :])
        self._from = self._shown = len(self._ids)
        return new[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Stopper:
    """Lets text through up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What may be shown of the text so far; after a stop string nothing."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, once no more comes."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
