"""A ranking of key heads in a file, and the heads that a share of it names."""

import contextlib
import re
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from lizard_jax import sharding
from lizard_jax.config import ModelConfig
from lizard_jax.convert.files import read_json
from lizard_jax.convert.hf_config import model_config
from lizard_jax.convert.load import load_hf
from lizard_jax.data.haystack import Measure
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from lizard_jax.select.needles import make
from lizard_jax.select.rank import retrieval_scores
from lizard_jax.typing import Float
from pallas_kernels import partition

FORMAT = 1
LENGTH, SAMPLES = 1024, 8
"""Tokens and number of the texts of ``auto``."""
SHARE = "10%"
"""How many heads are taken where nothing is said: with fewer needles are lost, with more little is won."""


class Ranking(BaseModel):
    """What ``heads.json`` holds: a score for every layer and key head, the higher the more is lost without it."""

    model_config = ConfigDict(strict=True)

    format: Literal[1] = FORMAT
    by: Literal["retrieval", "loss"]
    layers: int
    kv_heads: int
    scores: list[list[float]]

    @property
    def names(self) -> list[str]:
        """All heads as LAYER.HEAD, the best first."""
        scores = np.asarray(self.scores)
        order = np.argsort(-scores, axis=None, kind="stable")
        return [f"{index // self.kv_heads}.{index % self.kv_heads}" for index in order]


def ranking(by: Literal["retrieval", "loss"], scores: Float[np.ndarray, "L K"]) -> Ranking:
    """The scores as a ranking."""
    return Ranking(by=by, layers=scores.shape[0], kv_heads=scores.shape[1], scores=scores.tolist())


def read(file: str | Path) -> Ranking:
    """The ranking in a file.

    Raises:
        UserError: it is missing, or no such file.
    """
    raw: Any = read_json(Path(file).expanduser())
    with contextlib.suppress(ValidationError, ValueError):
        found = Ranking.model_validate(raw)
        if np.shape(found.scores) == (found.layers, found.kv_heads) and np.isfinite(found.scores).all():
            return found
    raise UserError(f"{file} is no ranking of key heads; make one with python -m lizard_jax.select TEACHER")


def asked(spec: str) -> tuple[str, str]:
    """``FILE:10%`` as the file (or ``auto``) and how many heads; a tenth where that is left out.

    Raises:
        UserError: no number of heads, or a share beyond all of them.
    """
    match = re.fullmatch(r"(.+?)(?::(\d+%?|\d+\.\d+%))?", spec, re.DOTALL)
    assert match is not None
    count = match[2] or SHARE
    if float(count.rstrip("%")) == 0 or (count.endswith("%") and float(count[:-1]) >= 100):
        raise UserError(f"--heads {spec}: {count} of the key heads; give a number, or a share between 0% and 100%")
    return match[1], count


def best(found: Ranking, count: str, config: ModelConfig) -> tuple[str, ...]:
    """The best heads of a ranking, as many as ``count`` (``9`` or ``10%``) says, at least one.

    Raises:
        UserError: the ranking is of another model's heads, or has fewer.
    """
    if (found.layers, found.kv_heads) != (config.num_layers, config.kv_heads):
        raise UserError(
            f"the ranking is of {found.layers} layers of {found.kv_heads} key heads, and the model has "
            f"{config.num_layers} of {config.kv_heads}; make one of this model with python -m lizard_jax.select"
        )
    total = found.layers * found.kv_heads
    number = round(total * float(count[:-1]) / 100) if count.endswith("%") else int(count)
    if number >= total:
        raise UserError(f"{count} of {total} key heads would leave nothing to linearize")
    return tuple(found.names[: max(1, number)])


def automatic(source: Path, window: int, mesh: Mesh | None = None) -> Ranking:
    """A ranking by retrieval, made now: what ``auto`` stands for. The teacher is read in its own dtype, over the mesh.

    Raises:
        UserError: no such teacher, or its context is no longer than the window.
    """
    model, measure = load_hf(source, mesh=mesh), Measure(load_tokenizer(source))
    length = min(LENGTH, model.config.max_positions)
    if length <= window:
        raise UserError(f"the teacher's context of {length} tokens is no longer than the window of {window}")
    texts, quiet = make(measure, length, SAMPLES, seed=0), None if jax.process_index() == 0 else True
    over = contextlib.nullcontext() if mesh is None else partition.over(sharding.kernel_partition(mesh))
    with over, tqdm(total=SAMPLES, desc="choosing key heads", unit=" texts", disable=quiet, leave=False) as bar:
        return ranking("retrieval", retrieval_scores(model, texts, tick=bar.update))


def resolved(spec: str, source: Path, window: int, mesh: Mesh | None = None) -> tuple[str, ...]:
    """The key heads that ``--heads`` asks for, as LAYER.HEAD.

    Raises:
        UserError: as ``read``, ``asked``, ``best`` and ``automatic`` do.
    """
    where, count = asked(spec)
    config = model_config(read_json(source / "config.json"))
    return best(automatic(source, window, mesh) if where == "auto" else read(where), count, config)


def text(found: Ranking) -> str:
    """The file's content."""
    return found.model_dump_json(indent=1) + "\n"
