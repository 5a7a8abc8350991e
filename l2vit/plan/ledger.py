"""A whole training step as a ledger: launches, bytes, copies and arithmetic, by part and kind.

A launch is one call of an operator that is no view: a foreach call is one, an allocation counts
because it takes the host as long, an operator of ours counts as what it launches inside. What that
allocates, as PyTorch's operators do unseen, is a column of its own: in the host's time and not
among the launches. Gigabytes are those of the tensors an operator reads and writes, each once
(also one changed in place).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from l2vit.plan.devices import Device
from l2vit.plan.kinds import COPIES, WITHIN
from l2vit.plan.recorder import Operation


@dataclass(frozen=True)
class Totals:
    """Sums over some operations."""

    launches: int
    allocations: int
    """Inside operators of ours, beside the launches."""
    gigabytes: float
    copy_gigabytes: float
    """Part of the gigabytes: values that only change their place in memory."""
    teraflops: float
    device_ms: float
    """Time the device is busy."""
    host_ms: float
    """Time the host takes to launch."""

    @property
    def predicted_ms(self) -> float:
        """The longer of the two: the host launches while the device computes."""
        return max(self.device_ms, self.host_ms)

    def values(self) -> dict[str, Any]:
        return {**vars(self), "predicted_ms": self.predicted_ms}


@dataclass(frozen=True)
class Ledger:
    """One training step of one rank."""

    parts: Mapping[str, Counter[Operation]]
    device: Device
    low_precision: bool

    def totals(self, parts: Iterable[str] = ("model", "engine")) -> Totals:
        """The sums over ``parts``."""
        return self._sum(self._operations(parts))

    def by_kind(self, parts: Iterable[str] = ("model", "engine")) -> dict[str, Totals]:
        """The sums of each kind of operation, most bytes first."""
        kinds: dict[str, Counter[Operation]] = {}
        for operation, count in self._operations(parts).items():
            kinds.setdefault(operation.kind, Counter())[operation] += count
        sums = {kind: self._sum(operations) for kind, operations in kinds.items()}
        return dict(sorted(sums.items(), key=lambda item: -item[1].gigabytes))

    def values(self) -> dict[str, Any]:
        """Everything as plain values; the top-level figures are those of model and engine."""
        return {
            "device": self.device.name,
            **self.totals().values(),
            "by_kind": {kind: sums.values() for kind, sums in self.by_kind().items()},
            "parts": {part: self.totals([part]).values() for part in self.parts},
        }

    def text(self) -> str:
        """Tables of kinds and parts."""
        rows: list[tuple[str, ...]]
        rows = [("", "launches", "allocated", "GB", "copied", "TFLOP", "device ms", "host ms")]
        rows += [_row(kind, sums) for kind, sums in self.by_kind().items()]
        rows += [_row("model and engine", self.totals()), ("",) * 8]
        rows += [_row(part, self.totals([part])) for part in self.parts]
        width = max(len(row[0]) for row in rows)
        return "\n".join(
            f"{row[0]:<{width}}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows
        )

    def _operations(self, parts: Iterable[str]) -> Counter[Operation]:
        return sum((self.parts[part] for part in parts if part in self.parts), Counter())

    def _sum(self, operations: Counter[Operation]) -> Totals:
        device = self.device
        busy = device.device_seconds(operations, low_precision=self.low_precision)
        copied = sum(op.bytes * n for op, n in operations.items() if op.kind == COPIES)
        return Totals(
            launches=sum(n for op, n in operations.items() if op.kind != WITHIN),
            allocations=sum(n for op, n in operations.items() if op.kind == WITHIN),
            gigabytes=sum(op.bytes * n for op, n in operations.items()) / 1e9,
            copy_gigabytes=copied / 1e9,
            teraflops=sum(op.flops * n for op, n in operations.items()) / 1e12,
            device_ms=1e3 * busy,
            host_ms=1e3 * device.host_seconds(operations),
        )


def _row(name: str, sums: Totals) -> tuple[str, ...]:
    return (
        name,
        f"{sums.launches:,}",
        f"{sums.allocations:,}",
        f"{sums.gigabytes:,.2f}",
        f"{sums.copy_gigabytes:,.2f}",
        f"{sums.teraflops:,.2f}",
        f"{sums.device_ms:,.2f}",
        f"{sums.host_ms:,.2f}",
    )
