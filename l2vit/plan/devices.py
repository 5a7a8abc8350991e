"""Stated figures of devices: what the maker says, and the shares of it that we assume to reach.

Peaks are the makers' data sheets (dense, no sparsity). The shares, the decoding rates and the
time to launch a kernel are assumptions: replace them in a file of your own once measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from l2vit import config
from l2vit.errors import ConfigError


@dataclass
class Device:
    """One accelerator and its share of the node and network around it."""

    name: str
    memory_gib: float
    """Memory a process can allocate."""
    matmul_tflops: float
    """Peak of dense bf16 matrix products."""
    vector_tflops: float
    """Peak of fp32 arithmetic outside the matrix units (depthwise convolutions run there)."""
    memory_tbs: float
    """Memory bandwidth, TB/s."""
    node_gbs: float
    """Bandwidth to the other devices of the node, one direction, GB/s."""
    network_gbs: float
    """The device's share of the node's network, one direction, GB/s."""
    images_per_second: float
    """Images one device's share of the node reads, decodes and augments."""
    matmul_share: float = 0.5
    vector_share: float = 0.15
    memory_share: float = 0.6
    network_share: float = 0.7
    kernel_us: float = 5.0
    """Shortest time between two operations: launching costs this much."""
    reserve_gib: float = 6.0
    """Memory for the driver's context, NCCL, the decoder and fragmentation."""
    fp32_share: float = 0.5
    """Speed of fp32 matrix products (as TF32) relative to bf16."""

    @property
    def room_gib(self) -> float:
        """Memory that is left for training."""
        return self.memory_gib - self.reserve_gib

    def validate(self) -> None:
        for name, value in vars(self).items():
            if name not in ("name", "reserve_gib") and value <= 0:
                raise ConfigError(f"{name}: {value} must be positive")


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 79.0, 989.0, 67.0, 3.35, 450.0, 50.0, 3000.0),
        Device("h200", 140.0, 989.0, 67.0, 4.8, 450.0, 50.0, 3000.0),
        Device("a100", 79.0, 312.0, 19.5, 2.04, 300.0, 25.0, 2000.0),
    )
}
"""SXM boards of 80, 141 and 80 GB; a network card a device of 400, 400 and 200 Gb/s."""


def find(name: str) -> Device:
    """A built-in device, or one described by a YAML file with the fields of ``Device``.

    Raises:
        ConfigError: neither; or the file is not a description.
    """
    if name in DEVICES:
        return DEVICES[name]
    if not name.endswith((".yaml", ".yml")):
        known = ", ".join(sorted(DEVICES))
        raise ConfigError(f"--device: {name!r} is not one of {known} and no .yaml file")
    return config.load(Device, name)
