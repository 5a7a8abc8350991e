"""Checkpoints that know nothing of ranks, ZeRO stages or DeepSpeed.

A checkpoint is a directory ``step-NNNNNNNN`` holding ``part-RRRRR-of-WWWWW.safetensors`` and,
written last, ``checkpoint.json``: a directory without it is no checkpoint. Tensors go by the
model's own names: ``param/NAME``, ``moment1/NAME``, ``moment2/NAME``, ``ema/NAME``,
``buffer/NAME``, all fp32 but for integer buffers. Every part holds the runs of elements its rank
owned; the index in ``checkpoint.json`` says where each run belongs, so any number of ranks can
read what it needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from l2vit import files
from l2vit.errors import UserError

FORMAT = 1
META_NAME = "checkpoint.json"
FOLDER = "checkpoints"
BEST = "best"
_STEP = re.compile(r"step-(\d{8})")
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}

Weights = Literal["raw", "ema", "auto"]


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not what its index says."""


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says about itself."""

    step: int
    """Optimizer steps done."""
    epoch: int
    images_seen: int
    config: dict[str, Any]
    """The run's resolved configuration, as ``l2vit.config.to_tree`` gives it."""
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    class_hash: str
    manifest_hash: str
    data: dict[str, Any] = field(default_factory=dict)
    """Provenance of the training data, from its manifest."""
    git_commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """The last evaluation at or before this step."""
    has_ema: bool = False
    state: dict[str, Any] = field(default_factory=dict)
    """The trainer's own counters (``l2vit.train.state``)."""


@dataclass(frozen=True)
class Choice:
    """Which of a checkpoint's weights are taken, and why."""

    which: Literal["raw", "ema"]
    why: str


@dataclass(frozen=True)
class TensorSlice:
    """A run of one tensor's elements in one part."""

    key: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    numel: int


@dataclass(frozen=True)
class Part:
    """One rank's file, as it goes into the index."""

    name: str
    bytes: int
    sha256: str
    pieces: tuple[TensorSlice, ...]


def step_directory(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in the run directory ``run``."""
    return run / FOLDER / f"step-{step:08d}"


def part_name(rank: int, world: int) -> str:
    """File name of a rank's part."""
    return f"part-{rank:05d}-of-{world:05d}.safetensors"


# -- writing


def write_part(path: Path, tensors: Iterable[tuple[TensorSlice, torch.Tensor]]) -> Part:
    """Write host tensors as one safetensors file, hashed on the way, complete or absent.

    A run that is the whole tensor keeps the tensor's shape; others are one-dimensional.

    Raises:
        UserError: the disk refused; names ``path``.
    """
    listed = list(tensors)
    header: dict[str, Any] = {}
    offset = 0
    for piece, tensor in listed:
        whole = piece.numel == torch.Size(piece.shape).numel()
        end = offset + tensor.numel() * tensor.element_size()
        header[piece.key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(piece.shape) if whole else [piece.numel],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with files.atomic_writer(path) as stream:

        def put(data: bytes | memoryview) -> None:
            nonlocal size
            stream.write(data)
            digest.update(data)
            size += len(data)

        put(struct.pack("<Q", len(text)))
        put(text)
        for _, tensor in listed:
            if tensor.numel():
                put(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return Part(path.name, size, digest.hexdigest(), tuple(piece for piece, _ in listed))


def commit(directory: Path, meta: CheckpointMeta, parts: Iterable[Part]) -> None:
    """Write ``checkpoint.json``: from now on the directory is a checkpoint."""
    index: dict[str, dict[str, Any]] = {}
    listed = list(parts)
    for part in listed:
        for piece in part.pieces:
            entry = index.setdefault(piece.key, {"shape": list(piece.shape), "pieces": []})
            entry["pieces"].append([part.name, piece.start, piece.numel])
    described = {part.name: {"bytes": part.bytes, "sha256": part.sha256} for part in listed}
    content = {"format": FORMAT, **asdict(meta), "files": described, "tensors": index}
    content["hash"] = _content_hash(content)
    files.write_json(directory / META_NAME, content)


def _content_hash(content: Mapping[str, Any]) -> str:
    covered = {key: value for key, value in content.items() if key != "hash"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def link_best(directory: Path) -> None:
    """Point ``checkpoints/best`` at ``directory``."""
    link, temporary = directory.parent / BEST, directory.parent / f"{BEST}{files.TEMPORARY_SUFFIX}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(directory.name)
    temporary.replace(link)


def best_step(run: Path) -> int | None:
    """Step of the checkpoint ``best`` points at."""
    link = run / FOLDER / BEST
    match = _STEP.fullmatch(link.readlink().name) if link.is_symlink() else None
    return int(match[1]) if match else None


def prune(run: Path, *, keep_last: int, keep_every: int) -> None:
    """Delete complete checkpoints but the last ``keep_last``, multiples and the best one."""
    found = complete_steps(run)
    kept = set(found[-max(keep_last, 1) :]) | {best_step(run)}
    for step in found:
        if step not in kept and not (keep_every and step % keep_every == 0):
            remove(step_directory(run, step))


def remove(directory: Path) -> None:
    """Delete a checkpoint, its marker first, so that a kill leaves none that looks complete."""
    (directory / META_NAME).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


# -- finding


def _steps(run: Path) -> list[int]:
    folder = run / FOLDER
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else iter(())
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


def complete_steps(run: Path) -> list[int]:
    """Steps of the checkpoints in ``run`` that were committed, ascending; no hash is checked."""
    return [s for s in _steps(run) if (step_directory(run, s) / META_NAME).is_file()]


def torn_steps(run: Path) -> list[int]:
    """Steps of the saves in ``run`` that a kill interrupted: only these may be deleted."""
    places = ((step, step_directory(run, step)) for step in _steps(run))
    return [s for s, at in places if at.is_dir() and not os.path.lexists(at / META_NAME)]


def strange(run: Path) -> list[Path]:
    """What no save leaves: a file in place of a checkpoint, or no file in place of its index."""
    known = {*complete_steps(run), *torn_steps(run)}
    return [step_directory(run, step) for step in _steps(run) if step not in known]


def find(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest complete one of a run directory.

    Files are checked for their sizes here and for their hashes when they are read.

    Raises:
        UserError: there is none; says what was looked for.
    """
    if (path / META_NAME).is_file():
        return path
    run = path.parent if path.name == FOLDER else path
    problem = ""
    for step in reversed(complete_steps(run)):
        try:
            Reader(step_directory(run, step))
        except UserError as error:
            problem = problem or f" ({error})"
            continue
        return step_directory(run, step)
    raise UserError(f"no complete checkpoint in {path}{problem}")


# -- reading


class Reader:
    """An opened checkpoint.

    Raises:
        DamagedCheckpoint: the index does not fit its hash, or a part is missing or of another
            size.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / META_NAME
        content = files.read_json(path, what="checkpoint")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DamagedCheckpoint(f"{path} is not a checkpoint of format {FORMAT}")
        if content.get("hash") != _content_hash(content):
            raise DamagedCheckpoint(f"{path} does not fit its own hash: the file is damaged")
        names = CheckpointMeta.__dataclass_fields__
        values = {name: content[name] for name in names}
        values["classes"] = tuple(values["classes"])
        values["class_names"] = tuple(values["class_names"])
        self.meta = CheckpointMeta(**values)
        self.tensors: dict[str, dict[str, Any]] = content["tensors"]
        self._files: dict[str, dict[str, Any]] = content["files"]
        self._open: dict[str, Any] = {}
        for name, described in self._files.items():
            part = directory / name
            size = part.stat().st_size if part.is_file() else None
            if size != described["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DamagedCheckpoint(f"{part} {found}; it was written with {described['bytes']}")

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Check the hashes of this share of the parts (all of them by default).

        Raises:
            DamagedCheckpoint: names the file.
        """
        for name in sorted(self._files)[share::shares]:
            if files.sha256_file(self.directory / name) != self._files[name]["sha256"]:
                raise DamagedCheckpoint(f"{self.directory / name} does not fit its hash")

    def read(self, key: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Elements ``start`` … ``start + numel`` of the flattened tensor ``key``, on the host.

        Raises:
            UserError: the checkpoint holds no such tensor.
        """
        entry = self._entry(key)
        whole = torch.Size(entry["shape"]).numel()
        end = whole if numel is None else start + numel
        runs = []
        for name, first, count in sorted(entry["pieces"], key=lambda piece: piece[1]):
            low, high = max(start, first), min(end, first + count)
            if low < high or whole == 0:
                part = self._part(name).get_tensor(key).reshape(-1)
                runs.append(part[low - first : high - first])
        found = torch.cat(runs) if len(runs) != 1 else runs[0]
        if found.numel() != end - start:
            raise DamagedCheckpoint(f"{self.directory}: {key} is incomplete")
        return found

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor ``key`` in its shape."""
        return self.read(key).reshape(self._entry(key)["shape"])

    def choose(self, wish: Weights = "auto") -> Choice:
        """Which weights ``wish`` means.

        Raises:
            UserError: the average is asked for and there is none.
        """
        if wish == "ema" and not self.meta.has_ema:
            raise UserError(f"{self.directory} keeps no EMA; use its raw weights")
        if wish != "auto":
            return Choice(wish, self._compared() or "as asked")
        if not self.meta.has_ema:
            return Choice("raw", "no EMA was kept")
        compared = self._compared()
        if not compared:
            return Choice("ema", "not compared with the raw weights at this step")
        raw, averaged = self._figures()
        return Choice("raw" if raw > averaged else "ema", compared)

    def _figures(self) -> tuple[float, float]:
        """The main set's figure of this very step for raw weights and average; NaN for none."""
        state, metrics = self.meta.state, self.meta.metrics
        if state.get("evaluated_step") != self.meta.step:
            return math.nan, math.nan
        end = state.get("headline", "")
        return metrics.get(f"val{end}", math.nan), metrics.get(f"val_ema{end}", math.nan)

    def _compared(self) -> str:
        raw, averaged = self._figures()
        if math.isnan(raw) or math.isnan(averaged):
            return ""
        name = self.meta.state["headline"].strip("/")
        return f"{name} on data.val: raw {raw:.2f}, ema {averaged:.2f}"

    def weights(self, which: Weights = "auto") -> dict[str, torch.Tensor]:
        """Parameters and buffers by the model's names, fp32.

        Raises:
            UserError: the average is asked for and there is none.
        """
        averaged = self.choose(which).which == "ema"
        found = {}
        for key in self.tensors:
            kind, _, name = key.partition("/")
            if kind in ("param", "buffer"):
                average = f"ema/{name}"
                found[name] = self.tensor(average if averaged and average in self.tensors else key)
        return found

    def _entry(self, key: str) -> dict[str, Any]:
        if key not in self.tensors:
            raise UserError(f"{self.directory} holds no {key}: it is a checkpoint of another model")
        return self.tensors[key]

    def _part(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.directory / name, framework="pt")
        return self._open[name]


def read_meta(directory: Path) -> CheckpointMeta:
    """What the checkpoint at ``directory`` says about itself."""
    return Reader(directory).meta


def read_weights(directory: Path, which: Weights = "auto") -> dict[str, torch.Tensor]:
    """fp32 parameters and buffers by the model's names, every hash checked.

    Args:
        directory: a checkpoint, as ``find`` returns it.
        which: raw, ema, or auto (see `Reader.choose`).
    """
    reader = Reader(directory)
    reader.verify()
    return reader.weights(which)
