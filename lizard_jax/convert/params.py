"""Parameters of a model by path, and how arrays read from files become them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from lizard_jax.config import LoraConfig, ModelConfig
from lizard_jax.convert import table
from lizard_jax.convert.safetensors_io import DTYPES, TensorInfo
from lizard_jax.lora import add_lora
from lizard_jax.models import build
from lizard_jax.models.llama import Llama
from lizard_jax.nn.params import BaseParam
from lizard_jax.sharding import partition_spec

Progress = Callable[[int, int], None]
"""Called after each base weight with its bytes in the file and those of all of them."""


def silent(size: int, total: int) -> None:
    """The progress of nobody watching."""


def skeleton(config: ModelConfig, lora: LoraConfig | None = None) -> Llama:
    """A model of shapes only, adapters included, that costs no memory."""

    def make() -> Llama:
        model = build(config, rngs=nnx.Rngs(0))
        return model if lora is None else add_lora(model, lora, nnx.Rngs(0))

    return nnx.eval_shape(make)


def parameters(model: Llama, kind: type[nnx.Param] = nnx.Param) -> dict[str, nnx.Param]:
    """The model's own parameters of a kind by path, as ``layers/0/attention/q_proj/kernel``."""
    return {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model) if isinstance(node, kind)}


def place(array: np.ndarray | jax.Array, path: str, mesh: Mesh | None) -> jax.Array:
    """The array on the default device, or spread over the mesh as the parameter at ``path`` is."""
    if mesh is None:
        return jnp.asarray(array)
    sharding = NamedSharding(mesh, partition_spec(path, array.shape, dict(mesh.shape)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def hf_shape(shape: tuple[int, ...], transpose: bool) -> tuple[int, ...]:
    """The shape a parameter has in an HF file."""
    return shape[::-1] if transpose else shape


def misfits(wanted: dict[str, nnx.Param], infos: dict[str, TensorInfo], *, dtype: Any = None) -> list[str]:
    """Everything wrong between the parameters wanted and the tensors a checkpoint has, a phrase for each kind."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, variable in wanted.items():
        name, transpose = table.to_hf(path)
        expected[name] = hf_shape(variable.shape, transpose)
    shared = [name for name in expected if name in infos]
    problems = {
        "missing": [name for name in expected if name not in infos],
        "unexpected": [name for name in infos if name not in expected],
        "misshapen": [
            f"{name} {list(infos[name].shape)} instead of {list(expected[name])}"
            for name in shared
            if infos[name].shape != expected[name]
        ],
        "of an unsupported dtype": [
            f"{name} {infos[name].dtype}" for name in shared if not readable(infos[name].dtype, dtype)
        ],
    }
    return [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]


def _some(names: list[str], most: int = 8) -> str:
    """The names, or the first of them and how many more there are."""
    more = len(names) - most
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:most])} and {more} more"


def cast_base(model: Llama, dtype: DTypeLike) -> Llama:
    """The model with its base weights in another dtype, changed in place and one at a time."""
    for variable in parameters(model, BaseParam).values():
        variable.set_value(variable[...].astype(dtype))
    return model


def readable(stored: str, dtype: Any) -> bool:
    """Whether a stored dtype can be read; float64 must be narrowed by ``dtype`` unless jax has it enabled."""
    return stored in DTYPES and (stored != "F64" or dtype is not None or jax.config.read("jax_enable_x64"))
