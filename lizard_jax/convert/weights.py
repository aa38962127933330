"""The weights of an HF checkpoint directory, whatever files hold them, read one tensor at a time."""

import importlib.util
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lizard_jax.convert.files import read_json
from lizard_jax.convert.safetensors_io import TensorInfo, read_header, read_tensor
from lizard_jax.errors import UserError


class SafetensorsWeights:
    """Tensors spread over safetensors files; where one lies in several, ``shards`` says which counts."""

    def __init__(self, files: Iterable[Path], shards: dict[str, str] | None = None):
        self.infos: dict[str, TensorInfo] = {}
        for file in files:
            found = read_header(file)
            self.infos |= {name: info for name, info in found.items() if _counts(name, file, shards)}

    def read(self, name: str) -> np.ndarray:
        return read_tensor(self.infos[name])

    def rename(self, old: str, new: str) -> None:
        self.infos[new] = self.infos.pop(old)


def _counts(name: str, file: Path, shards: dict[str, str] | None) -> bool:
    return shards is None or shards.get(name, file.name) == file.name


def _is_file_name(name: str) -> bool:
    return name.isprintable() and name not in ("", ".", "..") and len(name.encode(errors="replace")) < 256


class TorchWeights:
    """Tensors of old PyTorch ``.bin`` files, loaded without running anything they contain."""

    def __init__(self, files: Iterable[Path], shards: dict[str, str] | None = None):
        if importlib.util.find_spec("torch") is None:
            raise UserError("PyTorch .bin weights need torch; install the extra with: uv sync --extra torch")
        import torch

        names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        self.infos: dict[str, TensorInfo] = {}
        self._tensors: dict[str, Any] = {}
        for file in files:
            for name, tensor in _load_torch(file).items():
                if not _counts(name, file, shards):
                    continue
                if not isinstance(tensor, torch.Tensor):
                    raise UserError(f"{file} holds {name}, which is no tensor; it is not a checkpoint of weights")
                self.infos[name] = TensorInfo(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), file)
                self._tensors[name] = tensor

    def read(self, name: str) -> np.ndarray:
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        return tensor.numpy().copy()

    def rename(self, old: str, new: str) -> None:
        self.infos[new] = self.infos.pop(old)
        self._tensors[new] = self._tensors.pop(old)


def _load_torch(file: Path) -> dict[str, Any]:
    import torch

    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{file} is truncated or holds more than weights; torch cannot load it safely") from error


Weights = SafetensorsWeights | TorchWeights


def open_weights(directory: Path) -> Weights:
    """The weights in ``directory``: safetensors, sharded or single, before ``.bin``, sharded or single.

    Raises:
        UserError: there are none, a shard is missing, or a file is truncated.
    """
    for kind, stem in ((SafetensorsWeights, "model.safetensors"), (TorchWeights, "pytorch_model.bin")):
        # As transformers chooses: one whole file comes before an index, which may be left over from before.
        if (directory / stem).is_file():
            return kind([directory / stem])
        index = directory / f"{stem}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise UserError(f"{index} has no weight_map of tensors to files")
            for name in sorted(set(shards.values())):
                if Path(name).name != name or not _is_file_name(name):
                    raise UserError(f"{index} names {name!a}, which is no file of this directory")
            files = [directory / name for name in sorted(set(shards.values()))]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                raise UserError(f"{directory} lacks the shards {', '.join(absent)} its index names")
            return kind(files, shards)
    raise UserError(f"{directory} is not a checkpoint: it has neither model.safetensors nor pytorch_model.bin")
