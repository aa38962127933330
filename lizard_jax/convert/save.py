"""Models as HF checkpoints: base weights, new modules beside them, adapters merged in or as PEFT reads them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from lizard_jax.convert import table
from lizard_jax.convert.files import appearing, carry, locate, write_json
from lizard_jax.convert.load import ADAPTER, NEW_MODULES
from lizard_jax.convert.origin import HEAD, carried_tensors, saved_config
from lizard_jax.convert.params import Progress, hf_shape, parameters, silent
from lizard_jax.convert.safetensors_io import stored, write_file
from lizard_jax.errors import UserError
from lizard_jax.lora import merged_kernel, projections
from lizard_jax.models.llama import Llama
from lizard_jax.nn.params import BaseParam, LoraParam, NewParam

SHARD_BYTES = 5_000_000_000

Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def save_hf(
    model: Llama,
    dst: str | Path,
    *,
    source: str | Path | None,
    adapter: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Writes an HF checkpoint directory, whole or not at all, one tensor in memory beside the model.

    Base weights go to safetensors (sharded where larger than ``shard_bytes``), new modules to ``lizard.safetensors``
    and their settings to the ``lizard`` section of config.json. Adapters are merged into the base weights, or with
    ``adapter`` written to ``adapter/`` for PEFT, the base untouched.

    Args:
        source: the checkpoint (HF or Flax directory, or hub id) whose config.json, generation config, tokenizer,
            licence and readme files are carried over; None writes a config.json alone.

    Raises:
        UserError: ``dst`` is not empty or cannot be written, ``source`` describes another model, or ``adapter`` is
            asked of a model without adapters.
    """
    if adapter and model.lora is None:
        raise UserError("the model carries no LoRA adapters to write; leave --adapter out")
    origin = None if source is None else locate(source)
    config = saved_config(model, origin)
    size = sum(variable[...].nbytes for variable in parameters(model).values())
    with appearing(dst, size=size) as directory:
        _write_base(model, directory, origin, adapter, shard_bytes, progress)
        new = parameters(model, NewParam)
        if new:
            _write(directory / NEW_MODULES, new)
        if adapter:
            _write_adapter(model, directory / ADAPTER, source)
        if origin is not None:
            carry(origin, directory)
        write_json(directory / "config.json", config)


def _write_base(
    model: Llama, directory: Path, origin: Path | None, adapter: bool, shard_bytes: int, progress: Progress
) -> None:
    base = {table.to_hf(path)[0]: (path, variable) for path, variable in parameters(model, BaseParam).items()}
    carried = carried_tensors(origin, model.config.tie_embeddings)
    merged = {} if adapter else {id(linear.kernel): linear for _, linear in projections(model)}

    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name, (path, variable) in base.items():
        shapes[name] = (np.dtype(variable.dtype), hf_shape(variable.shape, table.to_hf(path)[1]))
    if carried.tied_copy:
        shapes[HEAD] = shapes[table.to_hf("embed/embedding")[0]]
    shapes |= {name: stored(info) for name, info in (carried.buffers or {}).items()}

    total = sum(_size(entry) for entry in shapes.values())

    def tensor(name: str) -> np.ndarray:
        if name in base:
            path, variable = base[name]
            linear = merged.get(id(variable))
            array = np.asarray(variable[...] if linear is None else merged_kernel(linear))
            return array.T if table.to_hf(path)[1] else array
        if name == HEAD:
            return np.asarray(model.embed.embedding[...])
        return carried.read(name)

    def stream(names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name in names:
            array = tensor(name)
            yield name, array
            progress(array.nbytes, total)

    shards = _shards(shapes, shard_bytes)
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shapes, stream(shards[0]))
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, {name: shapes[name] for name in names}, stream(names))
        where |= dict.fromkeys(names, file)
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )


def _size(entry: tuple[np.dtype, tuple[int, ...]]) -> int:
    return entry[0].itemsize * int(np.prod(entry[1]))


def _shards(shapes: Shapes, shard_bytes: int) -> list[list[str]]:
    """Names in order, cut into files of at most ``shard_bytes`` (one tensor where that alone is larger)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in shapes.items():
        if shards[-1] and filled + _size(entry) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _size(entry)
    return shards


def _write(file: Path, variables: Mapping[str, nnx.Param]) -> None:
    shapes, sources = {}, []
    for path, variable in variables.items():
        name, transpose = table.to_hf(path)
        shapes[name] = (np.dtype(variable.dtype), hf_shape(variable.shape, transpose))
        sources.append((name, variable, transpose))

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, variable, transpose in sources:
            array = np.asarray(variable[...])
            yield name, array.T if transpose else array

    write_file(file, shapes, stream())


def _write_adapter(model: Llama, directory: Path, source: str | Path | None) -> None:
    lora = model.lora
    assert lora is not None
    directory.mkdir()
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None if source is None else str(source),
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": list(lora.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )
    _write(directory / "adapter_model.safetensors", parameters(model, LoraParam))
