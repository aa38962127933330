"""Prompts in, text out: prefill, then blocks of tokens, told piece by piece."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lizard_jax.errors import UserError
from lizard_jax.generate import decode
from lizard_jax.generate.conversation import Conversation
from lizard_jax.generate.prompts import check_ids, special_stops
from lizard_jax.generate.sampling import Sampling
from lizard_jax.generate.text import Detokenizer, Stopper
from lizard_jax.models.llama import Llama

Finish = Literal["eos", "stop", "length", "interrupted"]
PATIENCE = 0.1
"""Seconds of tokens to write between two looks at the screen."""


@dataclass
class Row:
    """What has become of one prompt."""

    prompt: list[int]
    detokenizer: Detokenizer
    stopper: Stopper
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None


class Generation:
    """One batch of prompts being continued: iterate over ``pieces()``; then ``rows`` hold the results.

    Args:
        prompts: token ids, at least one each, of any lengths.
        max_new_tokens: most tokens written for each prompt.
        stops: strings that end a row, special tokens among them; they are not part of its text.
        eos: token ids that end a row.
        earlier: the conversation that the one prompt goes on with.

    Raises:
        UserError: no prompt, an empty one, one with tokens that the model does not have, an ``earlier`` conversation
            with several prompts, or a state beyond the device's memory. From ``pieces``: logits that are not finite.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str] = (),
        eos: Sequence[int] = (),
        earlier: Conversation | None = None,
    ) -> None:
        if not 1 <= max_new_tokens < 2**31:
            raise UserError(f"max-new-tokens is {max_new_tokens}, must be at least 1 and below {2**31}")
        if earlier is not None:
            if len(prompts) != 1:
                raise UserError("a conversation goes on with one prompt, not with several")
            prompts = [[*earlier.pending, *prompts[0]]]
        if not len(prompts):
            raise UserError("there is no prompt; give at least one")
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {number + 1} is empty; give at least one token to go on from")
            check_ids(prompt, model.config.vocab_size, f"prompt {number + 1}")
        decode.check_room(model, len(prompts), decode.capacity([len(prompt) for prompt in prompts], max_new_tokens))
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        # Special tokens are no part of the text that stop strings are looked for in.
        ends, stops = special_stops(tokenizer, stops)
        self.model, self.sampling, self.eos = model, sampling, (*(int(x) for x in eos), *ends)
        self.stops, self.max_new_tokens, self.earlier = stops, max_new_tokens, earlier
        self.rows = [Row(list(prompt), Detokenizer(tokenizer, prompt), Stopper(self.stops)) for prompt in prompts]
        self.prefill_seconds = self.decode_seconds = 0.0
        self.interrupted = False
        self._carry: decode.Carry | None = None

    def pieces(self) -> Iterator[tuple[int, str]]:
        """``(row, text)`` as soon as there is text that can no longer change."""
        prompts = [row.prompt for row in self.rows]
        began = time.perf_counter()
        if self.earlier is None:
            lengths = [len(prompt) for prompt in prompts]
            room = decode.capacity(lengths, self.max_new_tokens)
            state, written, past = self.model.init_state(len(prompts), room), 0, []
        else:
            state = decode.with_room(self.earlier.state, [len(prompts[0])], self.max_new_tokens)
            written, past = self.earlier.written, self.earlier.tokens
        logits, state = decode.prefill(self.model, prompts, state)
        remembered = [[*past, *prompt] for prompt in prompts]
        carry = decode.start(logits, state, remembered, self.sampling, stops=self.eos, written=written)
        first = np.asarray(carry.token)
        self.prefill_seconds = time.perf_counter() - began
        yield from self._tell(first[None])
        count, began = 1, time.perf_counter()
        while not self.interrupted and any(row.finish is None for row in self.rows):
            carry = self._only_living(carry)
            left = max(self.max_new_tokens - len(row.tokens) for row in self.rows if row.finish is None)
            # A stop string is only seen here, and the state must not run past it.
            count = 1 if self.stops else min(count, left, decode.BLOCK)
            before = time.perf_counter()
            block, carry = decode.write(self.model, carry, count, self.sampling, stops=self.eos)
            spent = time.perf_counter() - before
            yield from self._tell(block)
            count = max(1, min(2 * count, int(PATIENCE * count / max(spent, 1e-6))))
        self.decode_seconds = time.perf_counter() - began
        self._carry = carry
        for number, row in enumerate(self.rows):
            if row.finish is None:
                row.finish = "interrupted"
                piece = self._rest(row)
                row.text += piece
                if piece:
                    yield number, piece

    def interrupt(self) -> None:
        """Ends every row after the tokens now under way; may be called from a signal's handler.

        Nothing else may: the arrays of the state are handed from step to step, and between two there are none.
        """
        self.interrupted = True

    def conversation(self, messages: Sequence[dict[str, str]] = ()) -> Conversation:
        """What is needed to go on with the one row, after ``pieces`` has ended."""
        (row,), carry = self.rows, self._carry
        assert carry is not None
        past = [] if self.earlier is None else self.earlier.tokens
        return Conversation(
            state=carry.state,
            pending=(int(np.asarray(carry.token)[0]),),
            written=int(np.asarray(carry.written)[0]),
            tokens=[*past, *row.prompt, *row.tokens] if self.sampling.remembers else [],
            messages=list(messages),
        )

    def _only_living(self, carry: decode.Carry) -> decode.Carry:
        """Rows that a stop string or their length ended are not alive on the device either."""
        living = jnp.asarray([row.finish is None for row in self.rows])
        return decode.replace(carry, alive=carry.alive & living)

    def _tell(self, block: np.ndarray) -> Iterator[tuple[int, str]]:
        decode.check_finite(self.model, block)
        for number, row in enumerate(self.rows):
            if row.finish is not None:
                continue
            fresh = [int(token) for token in block[:, number] if token >= 0]
            fresh = fresh[: self.max_new_tokens - len(row.tokens)]
            row.tokens += fresh
            if fresh and fresh[-1] in self.eos:
                row.finish = "eos"
            elif len(row.tokens) >= self.max_new_tokens:
                row.finish = "length"
            shown = [token for token in fresh if token not in self.eos]
            piece = row.stopper.add(row.detokenizer.add(shown)) if shown else ""
            if row.finish is not None and not row.stopper.stopped:
                piece += self._rest(row)
            if row.stopper.stopped:
                row.finish = "stop"
            row.text += piece
            if piece:
                yield number, piece

    def _rest(self, row: Row) -> str:
        """What was held back of a row that has ended."""
        return row.stopper.add(row.detokenizer.rest()) + row.stopper.rest()


def live_bytes() -> int:
    """Bytes of the arrays that live on devices now."""
    return sum(array.nbytes for array in jax.live_arrays())
