"""The model as lm-evaluation-harness sees one."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from lizard_jax.data.text import affixes
from lizard_jax.errors import UserError
from lizard_jax.eval._scoring import Scorer
from lizard_jax.generate.decode import broken
from lizard_jax.generate.engine import Generation
from lizard_jax.generate.prompts import check_ids
from lizard_jax.generate.sampling import Sampling

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Settings of the harness's other backends that change nothing about what is written here.
_NEUTRAL = {"do_sample": None, "use_cache": None, "num_beams": 1, "num_return_sequences": 1, "max_length": None}


class LizardLM(TemplateLM):
    """A loaded model for ``lm_eval.evaluate``; its answers are those of the harness's own HF backend.

    That includes the backend's conventions: a text that is too long loses its beginning; an empty context becomes BOS
    (EOS where there is none); and rolling log-likelihoods predict the BOS that the tokenizer puts in front too.

    Args:
        tokenizer: of ``lizard_jax.data.text.load_tokenizer``.
        end: token ids that end a generated text.
        batch_size: texts read at once.
        max_length: most tokens of context; None: the positions the configuration names, beyond which a linearized
            model can read.
    """

    backend = "causal"

    def __init__(
        self, model: Any, tokenizer: Any, *, end: Sequence[int] = (), batch_size: int = 8, max_length: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.end, self.batch_size = model, tokenizer, tuple(end), batch_size
        self.max_length = max_length or model.config.max_positions
        self.scorer = Scorer(model, batch=batch_size, max_length=self.max_length)
        self.answered = 0
        self._head = affixes(tokenizer)[0]

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context.

        Raises:
            UserError: the tokenizer has neither BOS nor EOS.
        """
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError("the tokenizer has neither BOS nor EOS, one of which has to stand in for an empty context")

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids behind what the tokenizer puts in front of a text, unless the text spells that out itself."""
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        head = [] if add_special_tokens is False or ids[: len(self._head)] == self._head else self._head
        return [*head, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            check_ids([*context, *continuation], self.model.config.vocab_size, "a request of the task")
        with self._bar(len(requests), "scoring") as bar:
            answers = self.scorer.score([request[1:] for request in requests], advance=bar.update)
        if not all(math.isfinite(score) for score, _ in answers):
            raise broken(self.model)
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        self.answered += len(requests)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Every token of each text given as many before it as windows of ``max_length`` allow, each scored once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            disjoint = [make_disjoint_window(pair) for pair in pairs]
            windows += [(None, *pair) for pair in disjoint]
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows))
        self.answered += len(requests) - len(windows)
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, in batches of the same settings, longest contexts first."""
        groups: dict[str, list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            context, kwargs = _arguments(request)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            groups.setdefault(repr(kwargs), []).append((number, ids))
        answers = [""] * len(requests)
        with self._bar(len(requests), "writing") as bar:
            for group in groups.values():
                group.sort(key=lambda item: len(item[1]), reverse=True)
                _, kwargs = _arguments(requests[group[0][0]])
                for at in range(0, len(group), self.batch_size):
                    part = group[at : at + self.batch_size]
                    # Draws depend on a prompt's place in its batch, so each batch takes a seed of its own.
                    texts = self._write([ids for _, ids in part], kwargs, seed=at // self.batch_size)
                    for (number, _), text in zip(part, texts, strict=True):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(part))
        self.answered += len(requests)
        return answers

    def _write(self, contexts: Sequence[list[int]], given: dict[str, Any], *, seed: int) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given))
        new = settings.pop("max_gen_toks")
        stops = [stop for stop in settings.pop("until") if stop]
        if new >= self.max_length:
            raise UserError(
                f"a task asks for {new} new tokens, and the model reads {self.max_length}; raise --max-length if it "
                "can read more"
            )
        drawn = bool(settings.get("do_sample"))
        options = {name: settings.pop(name) for name in _SAMPLING if name in settings}
        if not drawn:
            options = {name: value for name, value in options.items() if name == "repetition_penalty"}
        elif not options.get("temperature"):
            options["temperature"] = 1.0
        for name, value in settings.items():
            if name not in _NEUTRAL or _NEUTRAL[name] not in (None, value):
                raise UserError(f"a task asks for {name}={value} in its generation_kwargs, which is not supported here")
        run = Generation(
            self.model, self.tokenizer, [ids[-(self.max_length - new) :] for ids in contexts], max_new_tokens=new,
            sampling=Sampling(**options, seed=seed if drawn else 0), stops=stops, eos=self.end,
        )  # fmt: skip
        for _ in run.pieces():
            pass
        return [self._text(row.tokens, stops) for row in run.rows]

    def _text(self, tokens: Sequence[int], stops: Sequence[str]) -> str:
        """The continuation decoded by itself, as the harness does, and not as a part of its prompt."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, unit="request", file=sys.stderr, disable=None)


def _arguments(request: Instance) -> tuple[str, dict[str, Any]]:
    """Context and generation settings of a request, whose own type does not tell one kind of request from another."""
    arguments: Any = request.args
    context, settings = arguments
    return context, settings
