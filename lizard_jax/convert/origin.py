"""What a saved model takes over from the checkpoint it came from: configuration, and tensors no model reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lizard_jax.convert import table
from lizard_jax.convert.files import read_json
from lizard_jax.convert.hf_config import hf_dict, lizard_section, model_config
from lizard_jax.convert.safetensors_io import TensorInfo
from lizard_jax.convert.weights import SafetensorsWeights, Weights, open_weights
from lizard_jax.errors import UserError
from lizard_jax.models.llama import Llama

MANIFEST = "lizard_flax.json"
EXTRA = "extra.safetensors"
HEAD = "lm_head.weight"


def is_flax_dir(path: Path) -> bool:
    """Whether a directory is one that ``flax_dir`` wrote."""
    return (path / MANIFEST).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """What a Flax directory holds.

    Raises:
        UserError: it is not a Flax directory or its manifest is damaged.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; name a Flax directory or a run's stage directory")
    if not is_flax_dir(directory):
        raise UserError(f"{directory} is no Flax directory: it has no {MANIFEST}; convert.py hf2flax makes one")
    manifest = read_json(directory / MANIFEST)
    known = manifest.get("format") == 1 and {"parameters", "lora", "tied_copy"} <= manifest.keys()
    if not known or not _sound(manifest):
        raise UserError(f"{directory / MANIFEST} is of another format than this version reads")
    return manifest


def _sound(manifest: dict[str, Any]) -> bool:
    """Whether the parts of a manifest are what they are read as."""
    try:
        _Manifest.model_validate_json(json.dumps(manifest))
    except ValidationError:
        return False
    return True


class _Lora(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    rank: Annotated[int, Field(ge=1, le=2**14)]
    alpha: Annotated[float, Field(allow_inf_nan=False)]
    targets: list[str]


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True)
    parameters: dict[str, tuple[Literal["float64", "float32", "float16", "bfloat16"], list[int]]]
    lora: _Lora | None
    tied_copy: bool
    sums: dict[str, str] = {}


@dataclass(frozen=True)
class Carried:
    """Tensors of an HF checkpoint that its model has no use for.

    ``tied_copy`` says that a tied head was stored as a copy of the embedding; ``buffers`` are rotary frequencies.
    """

    tied_copy: bool = False
    buffers: dict[str, TensorInfo] | None = None
    weights: Weights | None = None

    def names(self) -> set[str]:
        return set(self.buffers or ()) | ({HEAD} if self.tied_copy else set())

    def read(self, name: str) -> np.ndarray:
        assert self.weights is not None
        return self.weights.read(name)


def unread(weights: Weights, tied: bool) -> Carried:
    """The tensors among ``weights`` that a model with a tied or untied head does not read."""
    buffers = {name: info for name, info in weights.infos.items() if table.BUFFERS.fullmatch(name)}
    return Carried(tied and HEAD in weights.infos, buffers, weights)


def carried_tensors(origin: Path | None, tied: bool) -> Carried:
    """The tensors that pass from an HF or Flax directory into what is saved from its model."""
    if origin is None:
        return Carried()
    if not is_flax_dir(origin):
        return unread(open_weights(origin), tied)
    tied_copy = bool(read_manifest(origin)["tied_copy"])
    if not (origin / EXTRA).is_file():
        return Carried(tied_copy)
    weights = SafetensorsWeights([origin / EXTRA])
    return Carried(tied_copy, weights.infos, weights)


def saved_config(model: Llama, origin: Path | None) -> dict[str, Any]:
    """The config.json of a model: its source's, with the attention and dtype the model has now.

    Raises:
        UserError: the source describes another decoder.
    """
    dtype = model.embed.embedding.dtype.name
    attention = model.config.attention
    raw = hf_dict(model.config, dtype=dtype) if origin is None else read_json(origin / "config.json")
    if model_config(raw, attention=attention) != model.config:
        raise UserError(f"{origin}/config.json describes another model than the one to be saved")
    raw.pop("lizard", None)
    for key in ("dtype", "torch_dtype"):
        if key in raw:
            raw[key] = dtype
    return raw if attention is None else raw | {"lizard": lizard_section(attention)}
