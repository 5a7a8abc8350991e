"""What was left out and what was repaired: the record files, their counts, the closing summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.plan import FATES
from data_prep.records import UnitResult, Workspace
from data_prep.sources import LeftOut, Unit
from l2vit import files
from l2vit.data.manifest import Manifest

_THUMBNAILS = 12  # per reason, for the report
_EXAMPLES = 2  # per reason, in the summary
_IMAGENET1K_VAL = 50_000


@dataclass
class Events:
    """Counts over one part's record files."""

    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {"rejected": Counter(), "repaired": Counter()}
    )
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first members left out for each reason."""
    of_own_part: Counter[str] = field(default_factory=Counter)
    """Reasons of images that the source itself counts to this part."""
    lost: int = 0
    """Members behind damage in archives."""

    @property
    def reasons(self) -> dict[str, dict[str, int]]:
        """Counts by kind and reason, sorted."""
        return {kind: dict(sorted(counter.items())) for kind, counter in self.counts.items()}

    def add(self, kind: str, event: dict[str, Any], part: str) -> None:
        """Count one line."""
        if kind not in self.counts:
            return
        reason = event["reason"]
        self.counts[kind][reason] += 1
        if kind == "rejected":
            self.lost += event.get("lost", 0)
            shown = self.examples.setdefault(reason, [])
            if len(shown) < _EXAMPLES:
                shown.append(_name(event))
            if event["split"] == part:
                self.of_own_part[reason] += 1


def write_events(
    workspace: Workspace,
    units: Sequence[Unit],
    left_out: Sequence[LeftOut],
    part: str,
    directory: Path,
) -> Events:
    """Write ``rejected.jsonl`` and ``repaired.jsonl`` of one part."""
    fates = np.load(workspace.fate, mmap_mode="r")
    events = Events()
    with (
        files.atomic_writer(directory / "rejected.jsonl") as rejected,
        files.atomic_writer(directory / "repaired.jsonl") as repaired,
    ):
        streams = {"rejected": rejected, "repaired": repaired}
        for event in _events(workspace, units, left_out, fates):
            if event.pop("fate", part) != part or event["split"] not in ("", part):
                continue
            kind = event.pop("kind")
            events.add(kind, event, part)
            line = json.dumps(event, ensure_ascii=False).encode("utf-8", "backslashreplace")
            streams[kind if kind in streams else "rejected"].write(line + b"\n")
    return events


def _name(event: dict[str, Any]) -> str:
    member, class_id = event["member"], event.get("class", "")
    if not member:
        return str(event["source"])
    return str(member) if class_id in member else f"{class_id}/{member}"


def _events(
    workspace: Workspace, units: Sequence[Unit], left_out: Sequence[LeftOut], fates: np.ndarray
) -> Iterator[dict[str, Any]]:
    start = 0
    for unit in units:
        result = UnitResult.load(workspace.unit_result(unit.number))
        for event in result.events:
            row = event.pop("row")
            event.pop("thumbnail", None)
            if row >= 0:
                event["fate"] = FATES[fates[start + row]]
            yield event
        start += len(result.records)
    with workspace.dropped.open() as stream:
        for line in stream:
            yield json.loads(line)
    for left in left_out:
        yield {
            "kind": "rejected",
            "source": left.source,
            "member": left.member,
            "class": "",
            "split": left.split,
            "reason": left.reason,
            "detail": "",
            "bytes": left.size,
            "sha256": "",
        }


def write_thumbnails(workspace: Workspace, units: Sequence[Unit]) -> None:
    """Gather small pictures of what was left out and repaired, for the report."""
    if workspace.thumbnails.exists():
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        for event in UnitResult.load(workspace.unit_result(unit.number)).events:
            shelf = found.setdefault(f"{event['kind']}: {event['reason']}", [])
            if event.get("thumbnail") and len(shelf) < _THUMBNAILS:
                shelf.append({name: event[name] for name in ("member", "detail", "thumbnail")})
    files.write_json(workspace.thumbnails, found)


def print_summary(manifest: Manifest, directory: Path, events: Events) -> None:
    """Say what one part holds and what it lacks."""
    size = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{manifest.split}: {manifest.samples:,} images, {len(manifest.classes):,} classes,"
        f" {len(manifest.shards):,} shards, {size / 1e9:,.3f} GB in {directory};"
        f" manifest {manifest.hash[:12]}"
    )
    for kind, reasons in events.reasons.items():
        words = ", ".join(
            f"{reason} {count:,}{_examples(events, kind, reason)}"
            for reason, count in reasons.items()
        )
        more = f"; {events.lost:,} members lost in damaged archives" if events.lost else ""
        total = f"{sum(reasons.values()):,}{f' ({words})' if words else ''}"
        print(f"  {kind}: {total}{more if kind == 'rejected' else ''}")
    if events.counts["rejected"]:
        print(f"  each is a line in {directory / 'rejected.jsonl'}")
    across = manifest.provenance["cross_class_duplicates"]
    if across:
        print(f"  equal images in different classes: {across:,} (kept)")
    for warning in _incomplete(manifest, events):
        print(f"WARNING: {warning}")


def _examples(events: Events, kind: str, reason: str) -> str:
    if kind != "rejected":
        return ""
    more = " ..." if events.counts[kind][reason] > _EXAMPLES else ""
    return f": {', '.join(events.examples[reason])}{more}"


def _incomplete(manifest: Manifest, events: Events) -> Iterator[str]:
    """Why accuracies on a validation or test part would not be the published ones."""
    if manifest.split not in ("val", "test"):
        return
    if lacking := sum(events.of_own_part.values()):
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in events.of_own_part.items())
        yield (
            f"{manifest.split} is incomplete: {lacking:,} of {manifest.samples + lacking:,} files"
            f" of the source's {manifest.split} part were left out ({reasons}); accuracies on it"
            " cannot be compared with published ones"
        )
    whole = manifest.provenance["split_rule"] == "the source's own part"
    is_1k = manifest.dataset == "imagenet1k" and manifest.provenance["release"] == "imagenet1k"
    if manifest.split == "val" and whole and is_1k and manifest.samples != _IMAGENET1K_VAL:
        yield (
            f"val holds {manifest.samples:,} images, ImageNet-1k's has {_IMAGENET1K_VAL:,}:"
            " accuracies on it cannot be compared with published ones"
        )
