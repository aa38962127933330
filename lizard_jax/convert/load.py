"""HF checkpoints as models: base weights, and the new modules and adapters of one this project saved."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lizard_jax.config import LizardConfig, LoraConfig
from lizard_jax.convert import table
from lizard_jax.convert.files import locate, read_json
from lizard_jax.convert.hf_config import lizard_config, model_config
from lizard_jax.convert.origin import HEAD, unread
from lizard_jax.convert.params import Progress, misfits, parameters, place, silent, skeleton
from lizard_jax.convert.weights import SafetensorsWeights, Weights, open_weights
from lizard_jax.errors import UserError
from lizard_jax.models.llama import Llama
from lizard_jax.nn.attention import mixer_of
from lizard_jax.nn.params import BaseParam, LoraParam, NewParam

PEFT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "lora_bias": (False,),
    "rank_pattern": (),
    "alpha_pattern": (),
    "modules_to_save": (),
    "exclude_modules": (),
    "layers_to_transform": (),
    "layers_pattern": (),
    "layer_replication": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "megatron_config": (),
    "alora_invocation_tokens": (),
}
"""Settings of a PEFT adapter that change what it computes, and their values for plain LoRA."""
NEW_MODULES = "lizard.safetensors"
ADAPTER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"


def load_hf(
    src: str | Path,
    *,
    attention: LizardConfig | None = None,
    dtype: DTypeLike | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Progress = silent,
) -> Llama:
    """The model of an HF checkpoint, read one tensor at a time.

    Args:
        src: a directory or a hub id. Weights are safetensors or, with torch installed, ``.bin``; sharded or single.
        attention: replaces softmax by Lizard attention with fresh modules drawn from ``seed``. A checkpoint that this
            project linearized brings its own; None then takes them as they are.
        dtype: of the base weights; None keeps each tensor's stored dtype. New modules and adapters stay float32.
        mesh: spreads every parameter over these devices as it arrives.
        progress: told of each base weight.

    Raises:
        UserError: no such checkpoint; an unsupported architecture or setting; tensors missing, unexpected, misshapen
            or of an unsupported dtype, all named at once; a truncated file; ``attention`` other than the checkpoint's.
    """
    directory = locate(src)
    if (directory / ADAPTER_CONFIG).is_file():
        # transformers would apply it where peft is installed, and leave it out where it is not.
        raise UserError(f"{src} holds a PEFT adapter ({ADAPTER_CONFIG}); merge it with PEFT first, or take it away")
    raw = read_json(directory / "config.json")
    try:
        saved = None if raw.get("lizard") is None else lizard_config(raw["lizard"])
        config = model_config(raw, attention=attention or saved)
    except UserError as error:
        raise UserError(f"{src}: {error}") from error
    if attention is not None and saved is not None and attention != saved:
        raise UserError(f"{src} is linearized already, with other attention settings than those asked for")

    adapter = directory / ADAPTER
    model = skeleton(config, _lora_config(adapter) if adapter.is_dir() else None)
    weights = open_weights(directory)
    embedding = table.to_hf("embed/embedding")[0]
    if config.tie_embeddings and HEAD in weights.infos and embedding not in weights.infos:
        weights.rename(HEAD, embedding)  # one tensor, stored under its other name
    base = parameters(model, BaseParam)
    extra = unread(weights, config.tie_embeddings)
    read = {name: info for name, info in weights.infos.items() if name not in extra.names()}
    problems = misfits(base, read, dtype=dtype)
    if extra.tied_copy and not problems:
        problems = _untied(weights)
    if problems:
        raise UserError(f"{src} does not fit its config.json; {'; '.join(problems)}")
    _fill(base, weights, dtype, mesh, progress)

    if saved is not None:
        if modules := parameters(model, NewParam):  # a window with real first tokens has none
            file = _existing(directory / NEW_MODULES)
            _fill_exactly(modules, SafetensorsWeights([file]), file, mesh)
    elif attention is not None:
        _start(model, nnx.Rngs(seed), mesh)
    if adapter.is_dir():
        file = _existing(adapter / "adapter_model.safetensors")
        _fill_exactly(parameters(model, LoraParam), SafetensorsWeights([file]), file, mesh)
    return model


def _untied(weights: Weights) -> list[str]:
    embedding = table.to_hf("embed/embedding")[0]
    if np.array_equal(weights.read(HEAD), weights.read(embedding), equal_nan=True):
        return []
    return [f"{HEAD} differs from {embedding} though tie_word_embeddings is true"]


def _fill(wanted: dict[str, nnx.Param], weights: Weights, dtype: Any, mesh: Mesh | None, progress: Progress) -> None:
    names = {path: table.to_hf(path) for path in wanted}
    total = sum(weights.infos[name].size for name, _ in names.values())
    for path, variable in wanted.items():
        name, transpose = names[path]
        variable.set_value(place(_read(weights, name, transpose, dtype), path, mesh))
        progress(weights.infos[name].size, total)


def _read(weights: Weights, name: str, transpose: bool, dtype: Any) -> np.ndarray:
    array = weights.read(name)
    if dtype is not None:
        array = array.astype(dtype, copy=False)
    return np.ascontiguousarray(array.T) if transpose else array


def _fill_exactly(wanted: dict[str, nnx.Param], weights: SafetensorsWeights, file: Path, mesh: Mesh | None) -> None:
    problems = misfits(wanted, weights.infos)
    if problems:
        raise UserError(f"{file} does not fit the settings beside it; {'; '.join(problems)}")
    _fill(wanted, weights, np.float32, mesh, silent)


def _start(model: Llama, rngs: nnx.Rngs, mesh: Mesh | None) -> None:
    """Fresh new modules in place of the shapes."""
    for index, block in enumerate(model.layers):
        block.attention.mixer = mixer_of(model.config, index, rngs=rngs)
    if mesh is not None:
        for path, variable in parameters(model, NewParam).items():
            variable.set_value(place(np.asarray(variable[...]), path, mesh))


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file} is missing though the checkpoint's settings call for it")
    return file


def _lora_config(adapter: Path) -> LoraConfig:
    file = adapter / ADAPTER_CONFIG
    raw = read_json(file)
    wrong = [
        key for key, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str)))
        if not isinstance(raw.get(key), kind) or isinstance(raw.get(key), bool)
    ]  # fmt: skip
    if wrong or raw["r"] < 1:
        raise UserError(f"{file} is no LoRA configuration: {', '.join(wrong or ['r'])} is missing or no such value")
    foreign = [f"{key}={raw[key]!r}" for key, ours in PEFT.items() if raw.get(key) not in (None, {}, [], *ours)]
    if isinstance(raw["target_modules"], str):
        foreign.append(f"target_modules={raw['target_modules']!r}, a pattern")
    if foreign:
        raise UserError(
            f"{file} asks for {'; '.join(foreign)}, which is not read here; merge the adapter with PEFT first"
        )
    # rsLoRA divides by the root of the rank, where the update is otherwise scaled by alpha / r.
    alpha = float(raw["lora_alpha"]) * (raw["r"] ** 0.5 if raw.get("use_rslora") else 1.0)
    return LoraConfig(rank=raw["r"], alpha=alpha, targets=tuple(map(str, raw["target_modules"])))
