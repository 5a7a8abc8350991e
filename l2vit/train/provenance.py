"""Which code and which libraries a run was made with."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from pathlib import Path

from l2vit import __version__


@functools.cache
def git_commit() -> str:
    """Commit of the code that runs, with ``+changes`` if it was edited; empty outside git."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(here: Path, *arguments: str) -> str:
    command = ["git", "-C", str(here), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"l2vit": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "deepspeed", "timm", "numpy", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
