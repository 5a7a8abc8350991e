"""Which picture comes when: groups of one orientation, the same for every number of ranks."""

from __future__ import annotations

import hashlib

import numpy as np

from l2vit.data.order import locate
from l2vit.data.rng import derive_key, permutation
from l2vit.errors import ConfigError


class GroupedOrder:
    """A pure function of (data, seed, epoch): every picture once, in groups of one kind.

    Each kind's pictures are shuffled and cut into groups; the last group of a kind is filled by
    repeating others of it. The groups are shuffled, and the last global batch is filled by
    repeating groups.

    Args:
        identity: of the data, such as the hash of its annotations.
        kinds: (pictures,) what must be equal within a group, such as the orientation.
        seed: the run's seed.
        group: pictures in a group.
        global_batch: pictures in an optimizer step over all ranks.
        numbers: the pictures' own numbers; None counts them from 0.

    Raises:
        ConfigError: nothing to train on, or groups that do not fit the batch.
    """

    def __init__(
        self,
        identity: str,
        kinds: np.ndarray,
        *,
        seed: int,
        group: int,
        global_batch: int,
        numbers: np.ndarray | None = None,
    ) -> None:
        if not len(kinds):
            raise ConfigError("data: no picture to train on")
        if global_batch % group:
            raise ConfigError(
                f"schedule.global_batch: {global_batch} is not a multiple of data.group={group}"
            )
        self._numbers = np.arange(len(kinds)) if numbers is None else np.asarray(numbers)
        self._kinds = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        self._key_parts = (identity, seed)
        self._plan: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.samples = len(kinds)
        self.group = group
        self.global_batch = global_batch
        groups = sum(-(-len(kind) // group) for kind in self._kinds)
        self.steps_per_epoch = -(-groups * group // global_batch)

    @property
    def fingerprint(self) -> str:
        """Equal for equal orders."""
        digest = hashlib.sha256()
        for kind in self._kinds:
            digest.update(self._numbers[kind].astype("<i8").tobytes() + b"|")
        parts = (*self._key_parts, self.group, self.global_batch, digest.hexdigest())
        return f"{derive_key(*parts):016x}"

    def epoch_ids(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch · global_batch,) int64 numbers of the pictures of ``epoch``."""
        if self._plan[0] != epoch:
            self._plan = (epoch, self._make(epoch))
        return self._plan[1]

    def _make(self, epoch: int) -> np.ndarray:
        rows = []
        for kind, members in enumerate(self._kinds):
            order = permutation(derive_key("pictures", *self._key_parts, epoch, kind), len(members))
            groups = -(-len(members) // self.group)
            rows.append(np.resize(members[order], (groups, self.group)))
        every = np.concatenate(rows)
        shuffled = permutation(derive_key("groups", *self._key_parts, epoch), len(every))
        wanted = self.steps_per_epoch * self.global_batch // self.group
        return self._numbers[every[np.resize(shuffled, wanted)]].reshape(-1).astype(np.int64)

    def locate(self, images_seen: int) -> tuple[int, int]:
        """(epoch, first position in it) of the step that starts after ``images_seen`` pictures.

        Raises:
            UserError: not a multiple of the global batch.
        """
        return locate(images_seen, self.global_batch, self.steps_per_epoch)

    def batch_ids(self, images_seen: int) -> tuple[int, np.ndarray]:
        """The epoch, and the (global_batch,) pictures, of the step after ``images_seen``."""
        epoch, first = self.locate(images_seen)
        return epoch, self.epoch_ids(epoch)[first : first + self.global_batch]
