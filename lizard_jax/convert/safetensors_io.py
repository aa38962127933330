"""The safetensors file format, one tensor at a time in either direction.

A file is 8 bytes of header length (little endian), a JSON header that maps each name to dtype, shape and byte range,
then the raw tensors. Reading one tensor touches only its bytes; writing needs only shapes beforehand.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lizard_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: its dtype as the format names it, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int = 0
    end: int = 0

    @property
    def size(self) -> int:
        """Bytes of the tensor; its dtype must be one of ``DTYPES``."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, checked to be all there.

    Raises:
        UserError: the file is truncated or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(f"{file} is truncated or not a safetensors file; fetch it again")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=lambda pairs: _once(pairs, file))
            header.pop("__metadata__", None)
            infos = {name: _info(entry, file, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file} has a corrupt safetensors header; fetch it again") from error
    last = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if not 8 + length <= info.begin <= info.end <= size:
            raise UserError(f"{file} is truncated: {name} ends at byte {info.end} of {size}; fetch it again")
        if info.begin < last:
            raise UserError(f"{file} is corrupt: the bytes of {name} overlap another tensor's; fetch it again")
        last = info.end
        if info.dtype in DTYPES and info.end - info.begin != info.size:
            raise UserError(f"{file} is corrupt: {name} has {info.end - info.begin} bytes for shape {info.shape}")
    return infos


def _once(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    """An object of a header; a name that comes twice would hide a tensor."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file} is corrupt: its header names {twice!a} twice; fetch it again")
    return dict(pairs)


def _info(entry: dict[str, Any], file: Path, start: int) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = [*shape, begin, end]
    if type(dtype) is not str or type(shape) is not list or not all(type(x) is int and 0 <= x < 2**63 for x in sizes):
        raise ValueError(f"{file}: {entry}")
    return TensorInfo(dtype, tuple(shape), file, start + begin, start + end)


def read_tensor(info: TensorInfo) -> np.ndarray:
    """The tensor in memory of its own; its dtype must be one of ``DTYPES``."""
    with info.file.open("rb") as stream:
        stream.seek(info.begin)
        out = np.fromfile(stream, dtype=DTYPES[info.dtype], count=math.prod(info.shape))
    if out.size != math.prod(info.shape):
        raise UserError(f"{info.file} changed while it was being read; try again")
    return out.reshape(info.shape)


def stored(info: TensorInfo) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and shape to write a tensor with as it was read.

    Raises:
        UserError: its dtype is none of ``DTYPES``.
    """
    if info.dtype not in DTYPES:
        raise UserError(f"{info.file} holds tensors of the unsupported dtype {info.dtype}")
    return DTYPES[info.dtype], info.shape


def write_file(
    file: Path, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes ``tensors``, which arrive in the order of ``shapes``, each dropped before the next is asked for."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for (expected, (dtype, shape)), (name, tensor) in zip(shapes.items(), tensors, strict=True):
            if (name, tensor.dtype, tensor.shape) != (expected, dtype, shape):
                raise ValueError(f"{name} {tensor.dtype}{tensor.shape} was announced as {expected} {dtype}{shape}")
            stream.write(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data)
