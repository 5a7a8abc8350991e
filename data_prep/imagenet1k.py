"""ImageNet-1k's validation labels: they come apart from the images, in the devkit."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

from l2vit.errors import UserError

_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)
_WNID = re.compile(r"\bn\d{8}\b")
_MAX_DEVKIT_MEMBER = 64 << 20


def is_devkit(path: Path) -> bool:
    """Whether a path is named like the ILSVRC2012 devkit, packed or unpacked."""
    return "devkit" in path.name.lower()


class Truth:
    """Class of each validation image."""

    def __init__(self) -> None:
        self.by_number: dict[int, str] = {}
        self.classes: set[str] = set()

    @property
    def known(self) -> bool:
        return bool(self.by_number)

    def wnid(self, member: str, source: str) -> str:
        """Class of the validation image ``member``.

        Raises:
            UserError: the ground truth has no such image.
        """
        match = _NUMBER.search(member)
        if match is None or int(match[1]) not in self.by_number:
            raise UserError(f"{source}: the ground truth has no label for {member}")
        return self.by_number[int(match[1])]

    def read(self, path: Path) -> None:
        """Read a devkit (.tar.gz or folder), a text file of one wnid a line in image order, lines
        ``image wnid``, or Kaggle's LOC_val_solution.csv.

        Raises:
            UserError: none of these.
        """
        if not is_devkit(path):
            self._read_text(path)
            return
        truth, meta = _devkit_files(path)
        numbers = [int(word) for word in truth.split()]
        wnids = _wnids_by_id(meta, path)
        self.classes = set(wnids.values())
        try:
            self.by_number = {i + 1: wnids[number] for i, number in enumerate(numbers)}
        except KeyError as error:
            raise UserError(f"{path}: ground truth names unknown class id {error}") from None

    def _read_text(self, path: Path) -> None:
        try:
            lines = path.read_text().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --val-labels {path}: {error}") from error
        count = 0
        for line in lines:
            wnid = _WNID.search(line)
            if wnid is None:
                continue
            count += 1
            number = _NUMBER.search(line)
            self.by_number[int(number[1]) if number else count] = wnid[0]
        if not self.by_number:
            raise UserError(f"--val-labels {path} holds no line with a wnid")
        self.classes = set(self.by_number.values())


def _devkit_files(path: Path) -> tuple[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        if path.is_dir():
            for name in (_TRUTH, _META):
                for file in path.rglob(name):
                    found[name] = file.read_bytes()
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = Path(member.name).name
                    small = member.isreg() and member.size <= _MAX_DEVKIT_MEMBER
                    content = archive.extractfile(member) if small else None
                    if name in (_TRUTH, _META) and content is not None:
                        found[name] = content.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"devkit {path} cannot be read ({error})") from error
    for name in (_TRUTH, _META):
        if name not in found:
            raise UserError(f"devkit {path} holds no data/{name}")
    return found[_TRUTH].decode(), found[_META]


def _wnids_by_id(meta: bytes, path: Path) -> dict[int, str]:
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        # Beyond the leaves come inner nodes of the tree, which no image carries.
        table = {int(number): str(wnid) for number, wnid in pairs}
        leaves = synsets["num_children"] if "num_children" in synsets.dtype.names else None
        if leaves is not None:
            inner = [int(n) for n, c in zip(synsets["ILSVRC2012_ID"], leaves, strict=True) if c]
            for number in inner:
                del table[number]
        return table
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"devkit {path}: meta.mat is not the expected table ({error})") from error
