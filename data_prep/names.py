"""Names of files and archive members: how they are shown, and the keys made of them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_KEY_LIMIT = 80  # the tar header holds 100 bytes, extension included


def escaped(name: str) -> str:
    r"""A name as records, reports and messages show it: the one rule, used everywhere.

    Bytes that are not UTF-8, which Python carries as lone surrogates, and control characters are
    written ``\xNN``; everything else stays as it is.
    """
    if name.isprintable():
        return name
    return "".join(_shown(character) for character in name)


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if 0xD800 <= code <= 0xDFFF:
        return f"\\u{code:04x}"
    if code < 0x20 or 0x7F <= code < 0xA0:
        return f"\\x{code:02x}"
    return character


def is_hidden(name: str) -> bool:
    """True for dot files, the ``._`` companions macOS writes among them, and its ``__MACOSX``."""
    last = Path(name).name
    return last.startswith(".") or last == "__MACOSX"


def sample_key(class_id: str, member: str) -> str:
    """Key of a sample: the member's stem, led by its class, in letters that no reader minds.

    A dot would end the key for webdataset; a slash or ``..`` would be a path.
    """
    stem = member.rsplit(".", 1)[0] if "." in Path(member).name else member
    stem = _UNSAFE.sub("_", stem.lstrip("./"))
    prefix = _UNSAFE.sub("_", class_id)
    if not stem.startswith(f"{prefix}_") and not stem.startswith("ILSVRC2012_val_"):
        stem = f"{prefix}_{stem}"
    if len(stem) > _KEY_LIMIT:
        digest = hashlib.sha256(member.encode("utf-8", "surrogateescape")).hexdigest()
        stem = f"{stem[: _KEY_LIMIT - 17]}-{digest[:16]}"
    return stem
