"""A model as a Flax directory: its parameters by Orbax, its config.json, tokenizer and licence beside them.

``params/`` is an Orbax checkpoint of a flat mapping from path to array. ``lizard_flax.json`` says what it holds: dtype
and shape of every parameter, the adapters, whether the HF original stored a tied head as a copy, and the checksums of
``params/``. Tensors of the original that no model reads (rotary buffers) wait in ``extra.safetensors``, so that a round
trip loses nothing.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from lizard_jax import orbax_noise
from lizard_jax.checksums import difference, sums
from lizard_jax.config import LoraConfig
from lizard_jax.convert.files import appearing, carry, disk_errors, locate, read_json, write_json
from lizard_jax.convert.hf_config import lizard_config, model_config
from lizard_jax.convert.origin import EXTRA, MANIFEST, carried_tensors, read_manifest, saved_config
from lizard_jax.convert.params import parameters, skeleton
from lizard_jax.convert.safetensors_io import stored, write_file
from lizard_jax.errors import UserError
from lizard_jax.models.llama import Llama
from lizard_jax.sharding import partition_spec

PARAMS = "params"


def _checkpointer(arrays: dict[str, Any]) -> ocp.Checkpointer:
    """Orbax with no more than the largest tensor in flight, so that memory stays near one copy of the model."""
    orbax_noise.quiet()
    largest = max(np.dtype(array.dtype).itemsize * int(np.prod(array.shape)) for array in arrays.values())
    limit: Any = 1.1 * largest / 1e9  # Orbax refuses a tensor that fills the limit exactly
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit, restore_concurrent_gb=limit))


def save_flax(model: Llama, dst: str | Path, *, source: str | Path) -> None:
    """Writes a Flax directory, whole or not at all, one or two tensors in memory beside the model.

    Args:
        source: the HF or Flax checkpoint the model came from; its config.json, generation config, tokenizer, licence
            and readme files are carried over.

    Raises:
        UserError: ``dst`` is not empty or cannot be written, or ``source`` describes another model.
    """
    origin = locate(source)
    config = saved_config(model, origin)
    carried = carried_tensors(origin, model.config.tie_embeddings)
    arrays = {path: variable[...] for path, variable in parameters(model).items()}
    manifest: dict[str, Any] = {
        "format": 1,
        "parameters": {path: [array.dtype.name, list(array.shape)] for path, array in arrays.items()},
        "lora": None if model.lora is None else dataclasses.asdict(model.lora),
        "tied_copy": carried.tied_copy,
    }
    with appearing(dst, size=sum(array.nbytes for array in arrays.values())) as directory:
        with disk_errors(dst), _checkpointer(arrays) as checkpointer:
            checkpointer.save((directory / PARAMS).absolute(), args=ocp.args.PyTreeSave(arrays))
        manifest["sums"] = sums(directory / PARAMS)
        if carried.buffers:
            shapes = {name: stored(info) for name, info in carried.buffers.items()}
            write_file(directory / EXTRA, shapes, ((name, carried.read(name)) for name in shapes))
        carry(origin, directory)
        write_json(directory / "config.json", config)
        write_json(directory / MANIFEST, manifest)


def load_flax(src: str | Path, *, mesh: Mesh | None = None) -> Llama:
    """The model of a Flax directory, bit for bit as it was saved, on one device or spread over a mesh.

    Raises:
        UserError: it is not a Flax directory, or its parts do not fit together or cannot be read.
    """
    directory = Path(src).expanduser()
    manifest = read_manifest(directory)
    raw = read_json(directory / "config.json")
    attention = None if raw.get("lizard") is None else lizard_config(raw["lizard"])
    lora = manifest["lora"]
    if lora is not None:
        lora = LoraConfig(**{**lora, "targets": tuple(lora["targets"])})
    model = skeleton(model_config(raw, attention=attention), lora)
    wanted = parameters(model)
    stored = {path: tuple(shape) for path, (_, shape) in manifest["parameters"].items()}
    if stored != {path: variable.shape for path, variable in wanted.items()}:
        odd = sorted(
            path
            for path in stored.keys() | wanted.keys()
            if path not in wanted or stored.get(path) != wanted[path].shape
        )
        raise UserError(f"{directory}: {MANIFEST} and config.json disagree about {', '.join(odd)}")

    shapes = {
        path: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=_sharding(path, tuple(shape), mesh))
        for path, (dtype, shape) in manifest["parameters"].items()
    }
    if (damage := difference(directory / PARAMS, manifest.get("sums", {}))) is not None:
        raise UserError(f"{directory / PARAMS} is damaged or incomplete: {damage}; convert it again")
    try:
        with orbax_noise.failing_quietly(), _checkpointer(shapes) as checkpointer:
            arrays = checkpointer.restore(
                (directory / PARAMS).absolute(),
                args=ocp.args.PyTreeRestore(
                    item=shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes)
                ),
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory / PARAMS} is damaged or incomplete: {str(error).splitlines()[0]}") from error
    for path, variable in wanted.items():
        variable.set_value(arrays[path])
    return model


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, partition_spec(path, shape, dict(mesh.shape)))
