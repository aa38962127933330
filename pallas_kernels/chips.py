"""Every fact of a chip that anything here is planned, tuned or compiled for, with its source."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.target import tpu_chip


@dataclasses.dataclass(frozen=True)
class GpuCompiler:
    """What XLA's GPU compiler asks about a card; ``shared`` is the most that one block can have, in bytes."""

    name: str
    cores: int
    shared_per_core: int
    shared: int
    l2: int
    clock_ghz: float
    fp32_lanes: int
    capability: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device, as JAX sees it.

    Attributes:
        title: as its maker names it.
        platform: ``gpu`` or ``tpu``.
        target: what its kernels are compiled for: ``sm_90``, ``v5e``.
        flops: peak of dense bf16 matmuls, FLOP/s.
        memory, bandwidth: of its own memory: bytes, bytes/s.
        link: bytes/s that a device can receive from its neighbours along one axis of the mesh.
        source: whose figures these are.
        devices: JAX devices of a chip.
        compiler: of a GPU.
        node: devices that ``link`` joins; ``beyond`` is what a device receives from outside.
    """

    title: str
    platform: str
    target: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    source: str
    devices: int = 1
    compiler: GpuCompiler | None = None
    node: int | None = None
    beyond: float = 0.0


_AMPERE = GpuCompiler(
    "NVIDIA A100-SXM4-80GB", 108, 167936, 166912, 40 << 20, 1.41, 64, "major: 8 minor: 0",
)  # fmt: skip
_HOPPER = GpuCompiler(
    "NVIDIA H100 80GB HBM3", 132, 233472, 232448, 50 << 20, 1.98, 128,
    "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES",
)  # fmt: skip

# Links: NVLink one way; of TPUs the two links of one axis of the torus, a sixth or a quarter of the chip's both-way
# figure each. Beyond a node: one port of InfiniBand a GPU, 200 Gb/s beside A100s, 400 beside the others.
CHIPS = {
    "a100": Chip(
        "A100", "gpu", "sm_80", 312e12, 80 << 30, 2.039e12, 300e9, "NVIDIA's A100 datasheet, 80 GB SXM",
        compiler=_AMPERE, node=8, beyond=25e9,
    ),
    "h100": Chip(
        "H100", "gpu", "sm_90", 989.4e12, 80 << 30, 3.35e12, 450e9, "NVIDIA's H100 datasheet, SXM, without sparsity",
        compiler=_HOPPER, node=8, beyond=50e9,
    ),
    "h200": Chip(
        "H200", "gpu", "sm_90", 989.4e12, 141 * 10**9, 4.8e12, 450e9, "NVIDIA's H200 datasheet, SXM, without sparsity",
        compiler=dataclasses.replace(_HOPPER, name="NVIDIA H200"), node=8, beyond=50e9,
    ),
    "v5e": Chip("v5e", "tpu", "v5e", 197e12, 16 << 30, 0.819e12, 100e9, "Google Cloud's page on TPU v5e"),
    "v5p": Chip("v5p", "tpu", "v5p", 459e12, 95 << 30, 2.765e12, 200e9, "Google Cloud's page on TPU v5p"),
    "v6e": Chip("v6e", "tpu", "v6e", 918e12, 32 << 30, 1.64e12, 200e9, "Google Cloud's page on TPU v6e"),
    "tpu7x": Chip(
        "TPU7x", "tpu", "tpu7x", 1153.5e12, 96 << 30, 3.69e12, 100e9, "Google Cloud's page on TPU7x, halved: two "
        "devices a chip", devices=2,
    ),
}  # fmt: skip
"""By the name that ``train.py --plan`` takes."""


def here(device: Any) -> Chip | None:
    """The chip of a device of JAX's; None for any other."""
    kind = str(device.device_kind)
    if device.platform == "tpu":
        return CHIPS.get(tpu_chip(kind) or "")
    return next((chip for chip in CHIPS.values() if chip.platform == device.platform and chip.title in kind), None)
