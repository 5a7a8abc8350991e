"""What a compiled Triton kernel comes to in machine code: registers, spills, instructions."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class MachineCode:
    registers: int
    spilled: int
    """Bytes of local memory a thread."""
    loops: list[int]
    """Instructions of each loop, an outer one with its inner ones once; inner ones first."""
    instructions: int
    """Of the whole kernel."""


def machine_code(built: Any, directory: Path) -> MachineCode:
    """The code of a kernel that ``triton.compile`` made, by NVIDIA's cuobjdump."""
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    usage, listing = (_cuobjdump(option, cubin) for option in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", listing)
    places = [int(place, 16) for place, _ in lines]
    loops = []
    for place, (_, instruction) in zip(places, lines, strict=True):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < place:
            loops.append(sum(int(jump[1], 16) <= other <= place for other in places))
    whole = sum("NOP" not in instruction for _, instruction in lines)
    return MachineCode(registers, stack + local, loops, whole)


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
