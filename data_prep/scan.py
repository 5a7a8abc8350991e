"""Pass 1: go through one unit, clean every image, and remember the good ones."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from data_prep.archives import Damaged
from data_prep.clean import CleanImage, Refused, clean
from data_prep.names import escaped, sample_key
from data_prep.options import Options
from data_prep.records import FORMS, RECORD, REPAIRED, SPOOLED, UnitResult, Workspace, key_hash
from data_prep.sources import Raw, Unit, read_unit
from data_prep.thumbnails import thumbnail
from l2vit import files

_NAME_LIMIT = 4096
_THUMBNAILS = 3  # per reason and unit


@dataclass(frozen=True)
class ScanContext:
    """What every worker of pass 1 needs to know."""

    options: Options
    workspace: Workspace
    labels: dict[str, int]


def scan_unit(scan: ScanContext, unit: Unit) -> int:
    """Clean one unit; its result file appears when everything about it is on disk.

    Returns:
        Members seen.
    """
    path = scan.workspace.unit_result(unit.number)
    with contextlib.ExitStack() as stack:
        writer = _UnitScanner(scan, unit, stack)
        try:
            for raw in read_unit(unit, scan.options.rules.max_bytes):
                writer.take(raw)
        except Damaged as error:
            if unit.kind != "tar" or unit.label == unit.path:
                raise
            # One bad class archive inside a sound outer one must not stop the other 21,840.
            whole = Raw("", unit.offset, unit.size, unit.class_id)
            writer.refuse(whole, "damaged-archive", str(error), lost=error.lost)
    part = writer.result()
    part.save(path)
    return part.seen


class _UnitScanner:
    def __init__(self, scan: ScanContext, unit: Unit, stack: contextlib.ExitStack) -> None:
        self.scan, self.unit, self._stack = scan, unit, stack
        self._spool: BinaryIO | None = None
        self.rows: list[tuple[int, ...]] = []
        self.text: list[bytes] = []
        self.events: list[dict[str, Any]] = []
        self.seen = self._spool_place = self._text_place = 0
        self._forms: Counter[str] = Counter()
        self._thumbnails: Counter[str] = Counter()

    def take(self, raw: Raw) -> None:
        """Clean one member and note what became of it."""
        if raw.class_id not in self.scan.labels:
            return
        self.seen += 1
        if raw.problem:
            self.refuse(raw, raw.problem, "")
            return
        if len(raw.name) > _NAME_LIMIT:
            self.refuse(replace(raw, name=f"{raw.name[:100]}..."), "name-too-long", "")
            return
        try:
            good = clean(raw.data, self.scan.options.rules)
        except Refused as refusal:
            self.refuse(raw, refusal.reason, refusal.detail)
            return
        self._forms[good.form] += 1
        self._keep(raw, good)

    def refuse(self, raw: Raw, reason: str, detail: str, **more: int) -> None:
        """Note that a member is left out."""
        self._event("rejected", raw, [reason], detail, **more)

    def _keep(self, raw: Raw, good: CleanImage) -> None:
        key = sample_key(raw.class_id, raw.name)
        digest = hashlib.sha256(good.data).digest()
        flags = offset = 0
        if good.data is not raw.data:
            flags |= SPOOLED
            offset = self._spool_place
            self._write_spool(good.data)
        if good.repairs:
            flags |= REPAIRED
            self._event("repaired", raw, list(good.repairs), "", key=key, sha256_out=digest.hex())
        text = f"{key}\t{raw.name}".encode("utf-8", "surrogateescape")
        self.rows.append(
            (
                key_hash(self.scan.options.seed, "order", key),
                int.from_bytes(digest[:8], "big"),
                int.from_bytes(digest[8:16], "big"),
                good.phash,
                raw.offset,
                offset,
                self._text_place,
                raw.size,
                len(good.data),
                self.unit.number,
                len(self.rows),
                self.scan.labels[raw.class_id],
                min(good.width, 65535),
                min(good.height, 65535),
                len(text),
                FORMS.index(good.form),
                flags,
            )
        )
        self.text.append(text)
        self._text_place += len(text)

    def _write_spool(self, data: bytes) -> None:
        """Images that are not in the source as they will be written."""
        if self._spool is None:
            path = self.scan.workspace.spool(self.unit.number)
            self._spool = self._stack.enter_context(files.atomic_writer(path))
        self._spool.write(data)
        self._spool_place += len(data)

    def _event(
        self, kind: str, raw: Raw, reasons: list[str], detail: str, **more: str | int
    ) -> None:
        event: dict[str, Any] = {
            "kind": kind,
            "row": len(self.rows) if kind == "repaired" else -1,
            "source": self.unit.label,
            "member": escaped(raw.name),
            "class": raw.class_id,
            "split": self.unit.split,
            "reason": "+".join(reasons),
            "detail": detail,
            "bytes": raw.size,
            "sha256": hashlib.sha256(raw.data).hexdigest() if raw.data else "",
            **more,
        }
        self._thumbnails[event["reason"]] += 1
        if raw.data and self._thumbnails[event["reason"]] <= _THUMBNAILS:
            event["thumbnail"] = thumbnail(raw.data)
        self.events.append(event)

    def result(self) -> UnitResult:
        return UnitResult(
            np.array(self.rows, dtype=RECORD),
            b"".join(self.text),
            self.events,
            self.seen,
            dict(self._forms),
        )
