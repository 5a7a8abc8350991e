"""The label contract: which class each row of a head means, in every 22k layout met in public.

The lists are timm's own tables; their hashes are pinned here, so another timm release cannot
silently renumber the classes of an existing shard directory or checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from l2vit.data.manifest import class_hash
from l2vit.errors import UserError

# name: (timm's table, classes, class_hash of the ordered list)
_TABLES = {
    "imagenet1k": (
        "imagenet_synsets.txt",
        1000,
        "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15",
    ),
    "imagenet12k": (
        "imagenet12k_synsets.txt",
        11821,
        "f6483e79f18a9b670d43d915ddba40bbcaf82cfc4e92a07bd44057b9d44935f3",
    ),
    "imagenet22k": (
        "imagenet22k_synsets.txt",
        21841,
        "0ae24538751973797b29d8dec412b2bdc61bc4ec3ecd081eba0735804236bbd2",
    ),
    "imagenet21k-goog": (
        "imagenet21k_goog_synsets.txt",
        21843,
        "66362bdedf36d933382edca5493fc562dcc17128ce36403c9e730a75f48cb2f2",
    ),
    "imagenet21k-p-fall11": (
        "imagenet21k_miil_synsets.txt",
        11221,
        "cd76d977daaa2f13a4a91fca0f53713f2f29675308d4ce0f0ee0e5b07a3164c6",
    ),
    "imagenet21k-p-winter21": (
        "imagenet21k_miil_w21_synsets.txt",
        10450,
        "f49dde3d69946b8635586432f34f35985f807d168286ce5fde746aac3a7d94c8",
    ),
    "imagenet22k-ms": (
        "imagenet22k_ms_synsets.txt",
        21842,
        "f2c7ac47500e1d1d70432d3cb2e2b2187c6880125439832bf4b4038f716ca278",
    ),
}
SWIN = "imagenet22k-swin"
LAYOUTS = (*_TABLES, SWIN)
"""Names of the known layouts, as :func:`layout` takes them."""
WINTER21_CLASSES = 19167
_SWIN_ROWS = 21841
_TEDDY = "n04399382"  # the one ImageNet-1k class that no 22k release holds
_NEAR = 0.9


def _table(file: str) -> tuple[str, ...]:
    return tuple(_file(file).split())


def _file(name: str) -> str:
    content = None
    with contextlib.suppress(OSError):
        content = pkgutil.get_data("timm.data", f"_info/{name}")
    if content is None:
        raise UserError(f"timm ships no class table {name}; install timm 1.0.26 or later")
    return content.decode()


@functools.cache
def layout(name: str) -> tuple[str | None, ...]:
    """Class identifier (wnid) of every row of a head in the layout ``name``.

    Rows nobody has named in public are None: only ``imagenet22k-swin`` has them. Its published
    1k map puts each ImageNet-1k class on the row that class has in Google's 21,843 (not on its
    row among the 21,841), and says nothing of the other rows.

    Raises:
        UserError: unknown name, or timm's table differs from the pinned one.
    """
    if name == SWIN:
        known = set(layout("imagenet1k")) - {_TEDDY}
        rows = layout("imagenet21k-goog")[:_SWIN_ROWS]
        return tuple(wnid if wnid in known else None for wnid in rows)
    if name not in _TABLES:
        raise UserError(f"unknown class layout {name!r}; known: {', '.join(LAYOUTS)}")
    file, count, pinned = _TABLES[name]
    classes = _table(file)
    if len(classes) != count or class_hash(classes) != pinned:
        raise UserError(f"timm's table {file} differs from the one {name} is pinned to")
    return classes


def class_list(name: str) -> tuple[str, ...]:
    """:func:`layout` for layouts whose every row is named.

    Raises:
        UserError: some rows have no public name.
    """
    rows = layout(name)
    named = tuple(row for row in rows if row is not None)
    if len(named) != len(rows):
        raise UserError(f"layout {name}: only {len(named)} of {len(rows)} rows have a public name")
    return named


def layout_from_map(rows_of_1k: Sequence[int], size: int) -> tuple[str | None, ...]:
    """Layout of a head known only through the row of each ImageNet-1k class.

    Args:
        rows_of_1k: (1000,) head row of every ImageNet-1k class, sorted by wnid; −1 where none.
        size: rows of the head.

    Raises:
        UserError: not 1,000 rows, or a row outside the head.
    """
    names = class_list("imagenet1k")
    if len(rows_of_1k) != len(names):
        raise UserError(f"a map of the ImageNet-1k classes has 1000 rows, not {len(rows_of_1k)}")
    rows: list[str | None] = [None] * size
    for wnid, row in zip(names, rows_of_1k, strict=True):
        if not -1 <= row < size:
            raise UserError(f"map row {row} of {wnid} is outside a head of {size} rows")
        # Teddy bear is in no 22k release: published maps point it at some stand-in.
        if row >= 0 and wnid != _TEDDY:
            rows[row] = wnid
    return tuple(rows)


def convert(
    values: np.ndarray,
    source: Sequence[str | None],
    target: Sequence[str | None],
    *,
    fill: float | None = None,
) -> np.ndarray:
    """Reorder the rows of a head, logits' classes or counts from one layout to another.

    Args:
        values: (len(source), ...) one row a class.
        source: class of each row of ``values``.
        target: class of each row wanted.
        fill: value for rows of ``target`` that ``source`` lacks; None makes them an error.

    Returns:
        (len(target), ...) same dtype.

    Raises:
        UserError: shapes disagree, a name occurs twice, or a class is missing and no fill given.
    """
    if len(values) != len(source):
        raise UserError(f"{len(values)} rows do not fit a layout of {len(source)} classes")
    rows = row_map(source, target)
    missing = np.flatnonzero(rows < 0)
    if len(missing) and fill is None:
        raise UserError(
            f"{len(missing)} of {len(target)} classes are missing from the source layout,"
            f" first {target[missing[0]]} (row {missing[0]})"
        )
    result = values[np.maximum(rows, 0)]
    if len(missing):
        result[missing] = fill
    return result


def row_map(source: Sequence[str | None], target: Sequence[str | None]) -> np.ndarray:
    """int64 (len(target),): row of ``source`` that means the same class, −1 where none does.

    Raises:
        UserError: a class occurs twice in either layout.
    """
    for rows in (source, target):
        named = [row for row in rows if row is not None]
        if len(set(named)) != len(named):
            raise UserError("a class occurs twice in a layout; rows would be ambiguous")
    places = {wnid: row for row, wnid in enumerate(source) if wnid is not None}
    found = (places.get(wnid, -1) if wnid is not None else -1 for wnid in target)
    return np.fromiter(found, np.int64, len(target))


def require_same(expected: str, found: str, *, what: str) -> None:
    """Check two class hashes.

    Raises:
        UserError: they differ; ``what`` names the two sides.
    """
    if expected != found:
        raise UserError(
            f"{what}: the ordered class lists differ (class hash {expected[:12]} against"
            f" {found[:12]}); labels would mean other classes"
        )


_EVALUATION_SETS = {
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
}
"""Evaluation sets of 200 ImageNet-1k classes, and timm's table of each."""


@functools.cache
def evaluation_classes(name: str) -> tuple[str, ...]:
    """wnids of ``imagenet-a`` or ``imagenet-r``, sorted."""
    return _table(_EVALUATION_SETS[name])


@functools.cache
def real_labels() -> tuple[tuple[int, ...], ...]:
    """ReaL ("Are we done with ImageNet?"): all right 1k classes of each validation image."""
    return tuple(tuple(rows) for rows in json.loads(_file("imagenet_real_labels.json")))


def usual_classes(count: int) -> tuple[str, ...]:
    """wnids in the usual (sorted) order of a head of 1,000 or 21,841 rows; else empty."""
    name = {1000: "imagenet1k", 21841: "imagenet22k"}.get(count)
    return class_list(name) if name else ()


def known_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Lemmas of each wnid where all are WordNet's; else empty."""
    known = _descriptions()[0]
    return class_names(classes) if all(wnid in known for wnid in classes) else ()


@functools.cache
def _descriptions() -> tuple[dict[str, str], dict[str, str]]:
    tables = []
    for file in ("imagenet_synset_to_lemma.txt", "imagenet_synset_to_definition.txt"):
        lines = _file(file).splitlines()
        tables.append(dict(line.split("\t", 1) for line in lines if "\t" in line))
    return tables[0], tables[1]


def class_names(classes: Iterable[str]) -> tuple[str, ...]:
    """Lemmas of each wnid (``tench, Tinca tinca``); the wnid itself where WordNet has none."""
    lemmas = _descriptions()[0]
    return tuple(lemmas.get(wnid, wnid) for wnid in classes)


def class_descriptions(classes: Iterable[str]) -> tuple[str, ...]:
    """WordNet's definition of each wnid; empty where there is none."""
    definitions = _descriptions()[1]
    return tuple(definitions.get(wnid, "") for wnid in classes)


@dataclass(frozen=True)
class Release:
    """What a set of class identifiers was recognised as."""

    name: str
    """``fall11``, ``winter21``, ``imagenet1k`` ..., or ``custom``."""
    classes: tuple[str, ...]


def recognise(found: Iterable[str]) -> Release:
    """Name the release a set of class identifiers belongs to, and pin its ordered class list.

    A set that equals no known one is ``custom``, its sorted identifiers the class list. A set
    that is almost a known one is an error: a class missing from a download would renumber all
    classes after it.

    Raises:
        UserError: nearly, but not quite, a known release.
    """
    wnids = frozenset(found)
    for name in _TABLES:
        classes = class_list(name)
        if wnids == frozenset(classes):
            return Release("fall11" if name == "imagenet22k" else name, classes)
    whole = frozenset(class_list("imagenet22k"))
    if len(wnids) == WINTER21_CLASSES and (
        frozenset(class_list("imagenet21k-p-winter21")) <= wnids <= whole
    ):
        return Release("winter21", tuple(sorted(wnids)))
    if _NEAR * WINTER21_CLASSES <= len(wnids) < WINTER21_CLASSES and wnids <= whole:
        raise UserError(
            f"the source holds {len(wnids)} ImageNet-22k classes; winter21 has {WINTER21_CLASSES}:"
            " complete the download, or give --classes found for a list of their own"
        )
    for name in ("imagenet22k", "imagenet12k", "imagenet1k"):
        _refuse_near(name, wnids)
    return Release("custom", tuple(sorted(wnids)))


def _refuse_near(name: str, wnids: frozenset[str]) -> None:
    classes = frozenset(class_list(name))
    common = len(classes & wnids)
    if common >= _NEAR * len(classes) and len(wnids) <= len(classes) / _NEAR:
        missing, extra = sorted(classes - wnids), sorted(wnids - classes)
        odd = f"missing {', '.join(missing[:3])}" if missing else f"extra {', '.join(extra[:3])}"
        raise UserError(
            f"the source holds {common} of the {len(classes)} classes of {name}"
            f" ({len(missing)} missing, {len(extra)} extra; {odd}): complete the download, or give"
            f" --classes {name} to keep its labels, or --classes found for a list of their own"
        )
