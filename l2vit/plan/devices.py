"""Stated figures of devices: what the maker says, and the part of it that programs reach.

Peaks are the makers' data sheets (dense, no sparsity). The shares of matrix products and memory
are published measurements of an H100 (large products 798 of 989 TFLOP/s, copies 3.0 of 3.35
TB/s). The other shares, the decoding rates and the times to launch are estimates: replace them
in a file of your own once measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from l2vit import config
from l2vit.errors import ConfigError
from l2vit.plan.kinds import ALLOCATION, WITHIN
from l2vit.plan.recorder import Operation


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
    matmul_share: float = 0.807
    vector_share: float = 0.15
    """Of convolutions outside the matrix units, as PyTorch and cuDNN run them."""
    issue_share: float = 0.5
    """Of the peak instruction rate that a kernel busy with addresses and conversions reaches."""
    memory_share: float = 0.9
    network_share: float = 0.7
    kernel_us: float = 2.0
    """Shortest time a kernel keeps the device."""
    host_us: float = 15.8
    """Time the host takes for an operator from Python, its autograd and its launch included."""
    reserve_gib: float = 6.0
    """Memory for the driver's context, NCCL, the decoder and fragmentation."""
    fp32_share: float = 0.5
    """Speed of fp32 matrix products (as TF32) relative to bf16."""

    def device_seconds(
        self, operations: Mapping[Operation, int], *, low_precision: bool = True
    ) -> float:
        """Time the device is busy: each kernel is bound by arithmetic, traffic or its start."""
        return sum(
            count * self._kernel_seconds(operation, low_precision)
            for operation, count in operations.items()
            if operation.kind not in (ALLOCATION, WITHIN)
        )

    def host_seconds(self, operations: Mapping[Operation, int]) -> float:
        """Time the host takes to launch them all."""
        return sum(operations.values()) * self.host_us * 1e-6

    def seconds(self, operations: Mapping[Operation, int], *, low_precision: bool = True) -> float:
        """Time of a step: the host launches while the device computes."""
        busy = self.device_seconds(operations, low_precision=low_precision)
        return max(busy, self.host_seconds(operations))

    def _kernel_seconds(self, operation: Operation, low_precision: bool) -> float:
        vector = self.vector_tflops * 1e12
        matmul = self.matmul_tflops * self.matmul_share * 1e12
        bandwidth = self.memory_tbs * self.memory_share * 1e12 * operation.memory_share
        arithmetic = {
            "matmul": operation.flops / (matmul * (1.0 if low_precision else self.fp32_share)),
            # Instructions where the compiler's count is known: a multiply-add is one, two flops.
            "vector": operation.instructions / (vector / 2 * self.issue_share)
            or operation.flops / (vector * self.vector_share),
            "memory": 0.0,
        }[operation.unit]
        return max(arithmetic, operation.bytes / bandwidth, self.kernel_us * 1e-6)

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
