"""``report``: one self-contained HTML page about a shard directory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.names import escaped
from data_prep.records import Workspace
from data_prep.thumbnails import thumbnail
from l2vit import charts, files, pages
from l2vit.data.manifest import LABEL_WIDTH, Manifest, Shard
from l2vit.errors import UserError

_SHEET_CLASSES = 30
_SHEET_IMAGES = 6
_SHEET_SHARDS = 4
_EXTREMES = 8  # largest and smallest classes shown
_BINS = 24
_MOST_MEASURED = 1_000_000


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Write ``report.html`` (or ``out``) about the shards in ``directory``.

    Thumbnails of rejected and repaired images and the pixel sizes come from the build directory;
    where that is gone the page says so and shows the rest.

    Raises:
        UserError: no finished shard directory, or shards that cannot be read.
    """
    manifest = Manifest.load(directory)
    workspace = Workspace((directory / manifest.provenance.get("build", ".build")).resolve())
    target = out or directory / "report.html"
    try:
        parts = [
            _head(directory, manifest),
            _counts(manifest),
            _images(manifest, workspace),
            _decisions(manifest, workspace),
            _leakage(manifest),
            _sheet(directory, manifest),
            _provenance(manifest),
        ]
    except OSError as error:
        raise UserError(f"cannot read {error.filename or directory}: {error.strerror}") from error
    title = escaped(f"{_name(manifest)} {manifest.split}: shards")
    files.write_text(target, pages.document(title, "".join(parts)))
    return target


def _shown(text: str) -> str:
    return pages.shown(escaped(text))


def _head(directory: Path, manifest: Manifest) -> str:
    reasons = manifest.provenance.get("reasons", {})
    size = sum(shard.bytes for shard in manifest.shards)
    used = sum(count > 0 for count in manifest.class_counts)
    cards = [
        (f"{manifest.samples:,}", "images"),
        (f"{used:,} of {len(manifest.classes):,}", "classes with images"),
        (f"{len(manifest.shards):,}", "shards"),
        (_bytes(size), "on disk"),
        (f"{sum(reasons.get('repaired', {}).values()):,}", "repaired"),
        (f"{sum(reasons.get('rejected', {}).values()):,}", "left out"),
    ]
    return (
        f"<h1>{_shown(_name(manifest))}, {_shown(manifest.split)} part</h1>"
        f'<p class="quiet">{_shown(str(directory))} · manifest <code>{manifest.hash[:16]}</code> ·'
        f" classes <code>{manifest.class_hash[:16]}</code></p>"
        + pages.cards((escaped(value), what) for value, what in cards)
    )


def _name(manifest: Manifest) -> str:
    """What the data is: a release by its classes, else the name of its source."""
    release = manifest.provenance.get("release", "custom")
    if release != "custom":
        return f"{manifest.dataset}, {release}" if release != manifest.dataset else release
    sources = manifest.provenance.get("options", {}).get("sources", ())
    names = ", ".join(Path(source).name for source in sources[:2])
    return f"{names or 'Images'}{' and more' if len(sources) > 2 else ''}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.3g} {unit}" if unit != "bytes" else f"{size:,.0f} bytes"
        size /= 1000
    return f"{size:,.2f} TB"


def _title(manifest: Manifest, label: int) -> str:
    name = manifest.class_names[label] if manifest.class_names else ""
    wnid = manifest.classes[label]
    return wnid if name in ("", wnid) else f"{name.split(',')[0]} ({wnid})"


def _counts(manifest: Manifest) -> str:
    counts = np.array(manifest.class_counts)
    order = np.argsort(-counts, kind="stable").tolist()
    pairs = [(escaped(_title(manifest, i)), float(counts[i])) for i in order]
    if len(pairs) <= 2 * _EXTREMES:
        bars = charts.bar_chart("All classes", pairs)
    else:
        bars = charts.bar_chart("Largest classes", pairs[:_EXTREMES])
        bars += charts.bar_chart("Smallest classes", pairs[-_EXTREMES:])
    return (
        '<section><h2>Images per class</h2><div class="two"><div>'
        f"{_spread('Classes by size', counts, 'images of a class')}"
        f'<p class="quiet">median {np.median(counts):,.0f}, mean {counts.mean():,.1f}, smallest'
        f" {counts.min():,}, largest {counts.max():,}</p></div><div>{bars}</div></div></section>"
    )


def _images(manifest: Manifest, workspace: Workspace) -> str:
    forms = sorted(manifest.provenance.get("source_formats", {}).items(), key=lambda f: -f[1])
    parts = [charts.bar_chart("Format in the source", forms)]
    path = workspace.order(manifest.split)
    if not path.is_file():
        parts.append('<p class="quiet">The build directory is gone: no sizes.</p>')
    else:
        order = np.load(path, mmap_mode="r")
        some = np.array(order[:_MOST_MEASURED])  # the order is random, so is its beginning
        width, height = some["width"].astype(float), some["height"].astype(float)
        parts += [
            _spread("Short side", np.minimum(width, height), "pixels"),
            _spread("Aspect ratio", width / height, "width / height"),
            _spread("File size", some["size"] / 1000, "kB"),
        ]
        if len(some) < len(order):
            parts.append(f'<p class="quiet">Sizes are of {len(some):,} random images.</p>')
    body = "".join(f"<div>{part}</div>" for part in parts)
    return f'<section><h2>The images</h2><div class="two">{body}</div></section>'


def _spread(title: str, values: np.ndarray, what: str) -> str:
    """Histogram of the bulk of the values; those far out are counted in words."""
    low, high = _fences(values)
    within = (values >= low) & (values <= high)
    whole = bool(np.all(values == np.floor(values)))
    bins = int(min(_BINS, max(1, high - low))) if whole else _BINS
    bars, edges = np.histogram(values[within], bins=bins, range=(low, max(high, low + 1e-6)))
    chart = charts.histogram(title, bars.tolist(), edges.tolist(), x_label=what)
    beyond = [
        f"{count:,} {'below' if side < low else 'above'}, down to {side:,.6g}"
        if side < low
        else f"{count:,} above, up to {side:,.6g}"
        for count, side in [
            (int(np.count_nonzero(values < low)), float(values.min())),
            (int(np.count_nonzero(values > high)), float(values.max())),
        ]
        if count
    ]
    note = f'<p class="quiet">Not in the chart: {"; ".join(beyond)}.</p>' if beyond else ""
    return chart + note


def _fences(values: np.ndarray) -> tuple[float, float]:
    """Bounds that a few values far out, however far, do not move."""
    first, third = np.percentile(values, [25, 75])
    reach = 3 * (third - first)
    low, high = float(values.min()), float(values.max())
    if reach == 0:  # most are equal: let the nearest percent on either side in
        near = np.percentile(values, [1, 99])
        return float(min(near[0], first)), float(max(near[1], third))
    return max(low, float(first - reach)), min(high, float(third + reach))


def _decisions(manifest: Manifest, workspace: Workspace) -> str:
    reasons = manifest.provenance.get("reasons", {})
    shelves: dict[str, list[dict[str, Any]]] = {}
    if workspace.thumbnails.is_file():
        shelves = json.loads(workspace.thumbnails.read_text())
    columns = []
    for kind, word, color in [
        ("repaired", "Repaired", charts.PALETTE[4]),
        ("rejected", "Left out", charts.PALETTE[1]),
    ]:
        found = reasons.get(kind, {})
        chart = charts.bar_chart("Images by reason", _rows(found), color=color)
        combined = [f"{name} {count:,}" for name, count in _falling(found) if "+" in name]
        note = f'<p class="quiet">Combined: {_shown(", ".join(combined))}</p>' if combined else ""
        pictures = "".join(
            f"<h3>{_shown(reason)}</h3>{_strip(shelves[f'{kind}: {reason}'])}"
            for reason, _ in _falling(found)
            if shelves.get(f"{kind}: {reason}")
        )
        body = chart + note + pictures or '<p class="quiet">none</p>'
        columns.append(f"<div><h2>{word}</h2>{body}</div>")
    across = manifest.provenance.get("cross_class_duplicates", 0)
    note = (
        f'<p class="quiet">{across:,} times the same bytes appear in two classes; these are kept'
        " and listed in rejected.jsonl. Every decision is a line in rejected.jsonl or"
        " repaired.jsonl.</p>"
    )
    return f'<section><div class="two">{"".join(columns)}</div>{note}</section>'


def _falling(reasons: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))


def _rows(reasons: dict[str, int]) -> list[tuple[str, float]]:
    """A row for each single reason, and one for all images with several."""
    several = sum(count for name, count in reasons.items() if "+" in name)
    rows = {name: count for name, count in reasons.items() if "+" not in name}
    if several:
        rows["several at once"] = several
    return [(name, float(count)) for name, count in _falling(rows)]


def _strip(pictures: list[dict[str, Any]]) -> str:
    figures = "".join(
        _figure(picture["thumbnail"], picture["member"], picture["detail"]) for picture in pictures
    )
    return f'<div class="strip">{figures}</div>'


def _figure(data: str, caption: str, title: str) -> str:
    words = _shown(caption)
    return (
        f'<figure title="{_shown(title or caption)}"><img alt="{words}"'
        f' src="data:image/jpeg;base64,{data}"><figcaption>{words}</figcaption></figure>'
    )


def _leakage(manifest: Manifest) -> str:
    guard = manifest.provenance.get("leakage_guard")
    if guard is None:
        body = '<span class="pill warn">not asked for</span> No exclusion list was given.'
    else:
        exact, near = guard.get("excluded-exact", 0), guard.get("excluded-near", 0)
        body = (
            f'<span class="pill good">on</span> {guard["listed"]:,} images listed; {exact:,} exact'
            f" copies and {near:,} near copies (up to {guard['distance']} of 64 bits) kept out."
        )
    return f"<section><h2>Leakage guard</h2><p>{body}</p></section>"


def _sheet(directory: Path, manifest: Manifest) -> str:
    shelves = _drawn(directory, manifest)
    blocks = []
    for label in sorted(shelves):
        figures = "".join(
            f'<figure title="{_shown(key)}"><img alt="{_shown(key)}"'
            f' src="data:image/jpeg;base64,{data}"></figure>'
            for key, data in shelves[label]
        )
        title = _shown(_title(manifest, label))
        blocks.append(
            f'<div><h3 title="{title}">{title}</h3><div class="strip">{figures}</div></div>'
        )
    return (
        "<section><h2>A random look</h2>"
        f'<p class="quiet">{len(shelves)} of {len(manifest.classes):,} classes, drawn from the'
        f' first shards</p><div class="sheet">{"".join(blocks)}</div></section>'
    )


def _drawn(directory: Path, manifest: Manifest) -> dict[int, list[tuple[str, str]]]:
    """Thumbnails by label: the shuffle is global, so the first shards are a random sample."""
    found: dict[int, list[tuple[Shard, int, int, str]]] = {}
    for shard in manifest.shards[:_SHEET_SHARDS]:
        with (directory / shard.name).open("rb") as stream:
            for line in (directory / shard.index_name).read_text().splitlines()[1:]:
                words = line.split()
                stream.seek(int(words[5]))
                label = int(stream.read(LABEL_WIDTH))
                key = words[3].rpartition(".")[0]
                found.setdefault(label, []).append((shard, int(words[1]), int(words[2]), key))
    chosen = random.Random(0).sample(sorted(found), min(_SHEET_CLASSES, len(found)))
    shelves: dict[int, list[tuple[str, str]]] = {}
    for label in chosen:
        for shard, offset, size, key in found[label][:_SHEET_IMAGES]:
            with (directory / shard.name).open("rb") as stream:
                stream.seek(offset)
                shelves.setdefault(label, []).append(
                    (key, thumbnail(stream.read(size), square=True))
                )
    return shelves


def _provenance(manifest: Manifest) -> str:
    about = manifest.provenance
    options = dict(about.get("options", {}))
    rules = options.pop("rules", {})
    sources = options.pop("sources", [])
    pairs = [
        ("sources", ", ".join(sources)),
        ("release recognised", about.get("release", "unknown")),
        ("members looked at for this part", f"{about.get('members_seen', 0):,}"),
        ("split rule", about.get("split_rule", "")),
        ("options", ", ".join(f"{name}={value}" for name, value in options.items() if value)),
        ("cleaning rules", ", ".join(f"{name}={value}" for name, value in rules.items())),
        ("fate of the good images among them", _pairs(about.get("fates", {}))),
        ("versions", _pairs(about.get("versions", {}))),
        ("manifest hash", manifest.hash),
        ("class hash", manifest.class_hash),
    ]
    rows = "".join(
        f"<tr><td>{name}</td><td>{_shown(str(value))}</td></tr>" for name, value in pairs
    )
    return pages.section("Provenance", f'<table class="facts">{rows}</table>')


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in values.items()
    )
