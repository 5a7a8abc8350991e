"""``verify``: does a shard directory still hold what its manifest says?"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.archives import Damaged, members, open_window
from data_prep.clean import Refused, clean
from data_prep.listing import list_sources
from data_prep.options import Options, Rules
from data_prep.pool import Progress, parallel_map
from data_prep.records import Workspace
from data_prep.shards import WriteContext, shard_records, write_info, write_records
from data_prep.sources import Listing
from l2vit import files
from l2vit.data.manifest import LABEL_WIDTH, Manifest, Shard
from l2vit.data.shards import CHECKSUM_SUFFIX, LABELS_SUFFIX, checksum
from l2vit.errors import UserError


@dataclass(frozen=True)
class VerifyContext:
    """What every worker of a verification needs to know."""

    directory: Path
    manifest: Manifest
    decode: float
    """Share of the images decoded strictly, 0 … 1."""


@dataclass(frozen=True)
class Finding:
    """Result of one shard."""

    shard: int
    problem: str
    """Empty where all is well."""
    label_counts: np.ndarray
    """int64 (classes,)."""


def verify(directory: Path, *, decode: float, workers: int) -> tuple[Manifest, list[Finding]]:
    """Check hashes, indexes, labels, counts, and the decodability of a share of the images.

    Returns:
        The manifest, and the findings that are problems (those about the whole directory have
        shard −1).
    """
    manifest = Manifest.load(directory)
    checking = VerifyContext(directory, manifest, decode)
    progress = Progress("verify", manifest.samples)
    counts = np.zeros(len(manifest.classes), np.int64)
    bad = []
    for number, finding in parallel_map(
        check_shard, checking, range(len(manifest.shards)), workers
    ):
        samples = manifest.shards[number].samples
        progress.add(samples, samples)
        counts += finding.label_counts
        if finding.problem:
            bad.append(finding)
    progress.finish()
    if not bad and counts.tolist() != list(manifest.class_counts):
        bad.append(Finding(-1, "labels in the shards disagree with class_counts", counts))
    if not _info_agrees(manifest, directory):
        bad.append(Finding(-1, f"{directory / '_info.json'} disagrees with the manifest", counts))
    return manifest, sorted(bad, key=lambda finding: finding.shard)


def _info_agrees(manifest: Manifest, directory: Path) -> bool:
    try:
        info = json.loads((directory / "_info.json").read_text())["splits"][manifest.split]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    shards = [[shard.name, shard.samples] for shard in manifest.shards]
    stated = zip(info.get("filenames", ()), info.get("shard_lengths", ()), strict=False)
    return [list(pair) for pair in stated] == shards


def repair(directory: Path, manifest: Manifest, findings: list[Finding]) -> list[Finding]:
    """Rebuild the shards that were found bad from their source, to the very same bytes.

    Returns:
        What could not be mended.

    Raises:
        UserError: the build directory or the source is gone.
    """
    workspace = Workspace((directory / manifest.provenance.get("build", ".build")).resolve())
    if not workspace.order(manifest.split).is_file():
        raise UserError(f"--repair needs {workspace.root}, which the build left; build anew")
    options = Options.from_identity(manifest.provenance["options"], directory)
    units = Listing.load(workspace).units
    if any(str(workspace.root / "staged") in unit.path for unit in units):
        list_sources(options, workspace)  # unpacks gzip sources again
    writing = WriteContext(options, workspace, tuple(units), manifest.split, directory, again=True)
    left = []
    for finding in findings:
        if finding.shard < 0:
            write_info(manifest, directory)
            left += [] if _info_agrees(manifest, directory) else [finding]
            continue
        _rebuild(writing, manifest.shards[finding.shard], finding.shard)
        print(f"rebuilt {directory / manifest.shards[finding.shard].name}", flush=True)
        again = check_shard(VerifyContext(directory, manifest, decode=0.0), finding.shard)
        left += [again] if again.problem else []
    shutil.rmtree(workspace.root / "staged", ignore_errors=True)
    return left


def _rebuild(writing: WriteContext, shard: Shard, number: int) -> None:
    folder = writing.workspace.root / "repair"
    folder.mkdir(exist_ok=True)
    records = shard_records(writing.workspace, writing.split, number)
    result = write_records(writing, records, folder / shard.name)
    if result != shard:
        shutil.rmtree(folder)
        raise UserError(f"{shard.name} rebuilt from source differs from the manifest: build anew")
    for path in folder.iterdir():
        path.replace(writing.directory / path.name)
    files.sync_directory(writing.directory)
    shutil.rmtree(folder)


def check_shard(checking: VerifyContext, number: int) -> Finding:
    """Check one shard."""
    shard = checking.manifest.shards[number]
    counts = np.zeros(len(checking.manifest.classes), np.int64)
    try:
        problem = _problem(checking, shard, counts)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (Damaged, UserError) as error:
        problem = str(error)
    if problem:
        return Finding(number, f"{checking.directory / shard.name}: {problem}", counts * 0)
    return Finding(number, "", counts)


def _problem(checking: VerifyContext, shard: Shard, counts: np.ndarray) -> str:
    tar, index = checking.directory / shard.name, checking.directory / shard.index_name
    sums, kept = tar.with_suffix(CHECKSUM_SUFFIX), tar.with_suffix(LABELS_SUFFIX)
    for path in (tar, index, sums, kept):
        if not path.is_file():
            return f"{path.name} is missing"
    if tar.stat().st_size != shard.bytes:
        return f"{tar.stat().st_size} bytes instead of {shard.bytes}"
    if files.sha256_file(tar) != shard.sha256:
        return "SHA-256 differs from the manifest"
    if files.sha256_file(index) != shard.index_sha256:
        return "SHA-256 of the index differs from the manifest"
    for path in (sums, kept):
        if path.stat().st_size != 4 * shard.samples:
            return f"{path.name} does not hold four bytes a sample"
    checksums, labels = np.fromfile(sums, "<u4"), np.fromfile(kept, "<u4")
    lines = index.read_text().splitlines()
    with open_window(tar) as stream:
        entries = list(members(stream, shard.bytes, str(tar)))
        if lines[:1] != [f"v1.2 {shard.samples}"] or len(entries) != 2 * shard.samples:
            return "index, tar and manifest disagree on the number of samples"
        rows = zip(lines[1:], entries[::2], entries[1::2], checksums, labels, strict=True)
        for line, image, label, total, number in rows:
            extension = image.name.rpartition(".")[2]
            expected = (
                f"{extension} {image.offset} {image.size} {image.name}"
                f" cls {label.offset} {label.size} {label.name}"
            )
            if line != expected:
                return f"index line of {image.name} does not point at it"
            if label.name != f"{image.name.rpartition('.')[0]}.cls":
                return f"{image.name} is followed by {label.name}"
            stream.seek(label.offset)
            text = stream.read(label.size)
            if len(text) != LABEL_WIDTH or not text.isdigit() or int(text) >= len(counts):
                return f"{label.name} holds {text[:20]!r}, no label of {len(counts)} classes"
            if int(text) != number:
                return f"{label.name} differs from {kept.name}"
            counts[int(text)] += 1
            stream.seek(image.offset)
            data = stream.read(image.size)
            if checksum(data, text) != total:
                return f"checksum of {image.name} differs from {sums.name}"
            if _chosen(image.name, checking.decode):
                try:
                    clean(data, Rules(min_side=1))
                except Refused as refusal:
                    return f"{image.name} does not decode ({refusal.reason}: {refusal.detail})"
    return ""


def _chosen(name: str, share: float) -> bool:
    """A stable sample, so that two verifications look at the same images."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
