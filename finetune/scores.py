"""Accuracy, calibration and confusion from a classifier's answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BINS = 15
_TOP = 5


@dataclass
class Reliability:
    """Confidence against accuracy in ``BINS`` equal bins of confidence."""

    counts: np.ndarray
    confidence: np.ndarray
    """Mean confidence of each bin; 0 where it is empty."""
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: the mean |accuracy − confidence|, weighted by the counts."""
        total = max(int(self.counts.sum()), 1)
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / total)


class Scores:
    """Collects the answers of an evaluation; labels and answers are rows of one label set.

    Args:
        classes: identifier of every row.
        accepted: several right answers per sample id (ReaL); a sample with none is not counted.
    """

    def __init__(
        self, classes: tuple[str, ...], accepted: dict[int, frozenset[int]] | None = None
    ) -> None:
        self.classes = classes
        self._accepted = accepted
        self._labels: list[np.ndarray] = []
        self._answers: list[np.ndarray] = []
        self._confidence: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []

    def observe(self, logits: Tensor, labels: Tensor, sample_ids: np.ndarray) -> None:
        """Take a batch: logits (B, classes), labels (B,), ids (B,)."""
        if not len(labels):
            return
        probabilities = torch.softmax(logits.float(), 1)
        _, answers = logits.topk(min(_TOP, logits.shape[1]), 1)
        confidence = probabilities.gather(1, answers[:, :1])[:, 0]
        self._labels.append(labels.cpu().numpy())
        self._answers.append(answers.cpu().numpy())
        self._confidence.append(confidence.double().cpu().numpy())
        self._ids.append(np.asarray(sample_ids))

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 true rows."""
        return np.concatenate(self._labels)

    @property
    def answers(self) -> np.ndarray:
        """(N, up to 5) int64 rows, most likely first."""
        return np.concatenate(self._answers)

    @property
    def confidence(self) -> np.ndarray:
        """(N,) float64 probability of the first answer."""
        return np.concatenate(self._confidence)

    @property
    def ids(self) -> np.ndarray:
        """(N,) int64 sample ids."""
        return np.concatenate(self._ids)

    def right(self, k: int) -> np.ndarray:
        """(N,) bool: whether one of the first ``k`` answers is right."""
        if self._accepted is None:
            return (self.answers[:, :k] == self.labels[:, None]).any(1)
        return np.array(
            [
                bool(self._accepted[int(i)].intersection(row[:k].tolist()))
                for i, row in zip(self.ids, self.answers, strict=True)
            ]
        )

    def counted(self) -> np.ndarray:
        """(N,) bool: whether the image counts (under ReaL some have no right answer)."""
        if self._accepted is None:
            return np.ones(len(self.labels), bool)
        return np.array([bool(self._accepted[int(i)]) for i in self.ids])

    def summary(self) -> dict[str, Any]:
        """count, right answers and shares in percent, calibration error."""
        counted = self.counted()
        count = int(counted.sum())
        first, five = (int((self.right(k) & counted).sum()) for k in (1, _TOP))
        share = 100 / max(count, 1)
        return {
            "count": count,
            "top1_right": first,
            "top5_right": five,
            "top1": first * share,
            "top5": five * share,
            "ece": self.reliability().error,
        }

    def per_class(self) -> list[dict[str, Any]]:
        """For each class that occurs: identifier, count, right (first answer), accuracy in %."""
        counted, size = self.counted(), len(self.classes)
        counts = np.bincount(self.labels[counted], minlength=size)
        right = np.bincount(self.labels[counted & self.right(1)], minlength=size)
        return [
            {
                "class": name,
                "count": int(count),
                "right": int(hits),
                "accuracy": 100 * int(hits) / int(count),
            }
            for name, count, hits in zip(self.classes, counts, right, strict=True)
            if count
        ]

    def reliability(self) -> Reliability:
        """Bins (0, 1/15], (1/15, 2/15], ...: a confidence on an edge belongs to the lower bin."""
        counted = self.counted()
        confidence, right = self.confidence[counted], self.right(1)[counted]
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        some = np.maximum(counts, 1)
        return Reliability(
            counts=counts,
            confidence=np.bincount(bins, confidence, BINS) / some,
            accuracy=np.bincount(bins, right, BINS) / some,
        )

    def worst(self, rows: int) -> list[int]:
        """The ``rows`` classes with the lowest accuracy (then the most images), worst first."""
        number = {name: i for i, name in enumerate(self.classes)}
        ranked = sorted(self.per_class(), key=lambda c: (c["accuracy"], -c["count"]))
        return [number[c["class"]] for c in ranked[:rows]]

    def confusion(self, rows: list[int], columns: int) -> tuple[list[int], np.ndarray]:
        """Share of each answer for the given true classes.

        Returns:
            The answers shown (the rows' own classes, then the commonest others, ``columns`` in
            all) and the matrix (rows, columns + 1) whose last column holds all other answers.
        """
        first = self.answers[:, 0]
        inside = np.isin(self.labels, rows)
        common = Counter(first[inside].tolist())
        for row in rows:
            common.pop(row, None)
        shown = [*rows, *(answer for answer, _ in common.most_common(columns - len(rows)))]
        place = {answer: column for column, answer in enumerate(shown)}
        matrix = np.zeros((len(rows), len(shown) + 1))
        line = {row: i for i, row in enumerate(rows)}
        for label, answer in zip(self.labels[inside], first[inside], strict=True):
            matrix[line[int(label)], place.get(int(answer), len(shown))] += 1
        return shown, matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
