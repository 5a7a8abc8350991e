"""The first weights of a run that starts from another one's.

Everything but the classifier must fit tensor by tensor; resolution and window may differ, since
no parameter's shape depends on them. The classifier's rows follow their class identifiers
(wnids): ImageNet-22k to ImageNet-1k keeps 999 rows and initialises the one 22k does not know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from l2vit import files
from l2vit.data.manifest import class_hash
from l2vit.errors import UserError
from l2vit.models.convert import require_fit
from l2vit.models.families.resize import resize_tables
from l2vit.train.config import InitConfig
from l2vit.train.weights import (
    PretrainedWeights,
    architecture,
    head_name,
    read_pretrained,
)

Fate = Literal["loaded", "resized", "sliced", "initialised", "left out"]
_REPORT = "transfer_report"


@dataclass(frozen=True)
class TensorFate:
    """What became of one tensor, and why."""

    name: str
    shape: tuple[int, ...]
    fate: Fate
    why: str


@dataclass(frozen=True)
class TransferReport:
    """For each tensor of the new model: loaded, sliced or initialised; and what was left out."""

    source: str
    """What was read; empty for a start from scratch."""
    weights: str
    model: str
    head: str
    """One sentence on the classifier."""
    missing_classes: tuple[str, ...]
    """Classes of this run whose rows the source could not give."""
    note: str
    tensors: tuple[TensorFate, ...]

    def summary(self) -> str:
        """A few lines for the log."""
        if not self.source:
            return f"{self.model}: all {len(self.tensors)} tensors initialised (no init.source)"
        counts = Counter(tensor.fate for tensor in self.tensors)
        parts = ", ".join(f"{count} {fate}" for fate, count in counts.items())
        lines = [f"{self.model} from {self.source} ({self.weights}): {parts}", self.head]
        if self.missing_classes:
            shown = ", ".join(self.missing_classes[:5])
            more = ", ..." if len(self.missing_classes) > 5 else ""
            lines.append(
                f"initialised rows of {len(self.missing_classes)} classes the source"
                f" does not know: {shown}{more}"
            )
        return "\n".join([*lines, self.note] if self.note else lines)

    def save(self, directory: Path) -> None:
        """Write ``transfer_report.json`` and ``transfer_report.txt``, one line a tensor."""
        files.write_json(directory / f"{_REPORT}.json", asdict(self))
        width = max((len(tensor.name) for tensor in self.tensors), default=0)
        rows = [
            f"{t.fate:<11}  {t.name:<{width}}  {'x'.join(map(str, t.shape)):<14}  {t.why}"
            for t in self.tensors
        ]
        files.write_text(directory / f"{_REPORT}.txt", "\n".join([self.summary(), "", *rows, ""]))


@dataclass(frozen=True)
class _HeadPlan:
    """Which row of the source's head each row of the new one takes; −1: keeps its own."""

    rows: tuple[int, ...]
    kind: Literal["keep", "slice", "fresh"]
    sentence: str


def load_initial(
    model: nn.Module, init: InitConfig, *, classes: Sequence[str], class_names: Sequence[str]
) -> TransferReport:
    """Load ``init.source`` into ``model`` in place and say what became of each tensor.

    Args:
        model: freshly initialised, whole (not yet partitioned), any floating dtype.
        init: where from, raw or EMA, and what to do with the classifier.
        classes: identifier of every output of ``model``, in order.
        class_names: their readable names, only for the report's sentences.

    Raises:
        UserError: another model, missing or unknown tensors, or a classifier that cannot be
            kept or sliced as asked; names the source and the tensor or class.
    """
    own = model.state_dict()
    if not init.source:
        fates = [
            TensorFate(name, tuple(t.shape), "initialised", "from scratch")
            for name, t in own.items()
        ]
        name = architecture(model)
        return TransferReport("", "", name, "fresh head", tuple(classes), "", tuple(fates))
    name = architecture(model)
    source = read_pretrained(init.source, weights=init.weights, model=name, **_sizes(model))
    _require_same_model(model, source)
    head = head_name(model)
    skip = (f"{head}.",)
    try:
        weights, _ = resize_tables(source.weights, own)
    except ValueError as error:
        raise UserError(f"init.source {source.path} does not fit this run: {error}") from None
    where = f"init.source {source.path}"
    require_fit(weights, own, where=where, model=architecture(model), skip=skip)
    plan = plan_head(source, classes, init.head)
    fates = []
    with torch.no_grad():
        for name, tensor in own.items():
            if name.startswith(skip):
                fates.append(_load_head_tensor(name, tensor, source, plan))
            else:
                tensor.copy_(weights[name])
                fates.append(_body_fate(name, source.weights[name], tensor))
    fates += _left_out(source, plan, skip)
    missing = tuple(c for c, row in zip(classes, plan.rows, strict=True) if row < 0)
    missing = missing if plan.kind == "slice" else ()
    return TransferReport(
        source=str(source.path),
        weights=source.which,
        model=architecture(model),
        head=_name_classes(plan.sentence, missing, classes, class_names),
        missing_classes=missing,
        note="\n".join(filter(None, [source.choice and source.described, source.note])),
        tensors=tuple(fates),
    )


def _sizes(model: nn.Module) -> dict[str, int]:
    """What a released file is converted for, lest its tables are resized twice on their way."""
    arguments = getattr(model, "arguments", {})
    height, width = to_2tuple(arguments.get("img_size", 0))
    if height != width:
        return {}
    return {"input_size": height, "window_size": arguments.get("window_size", 0)}


def _body_fate(name: str, given: Tensor, tensor: Tensor) -> TensorFate:
    shape = tuple(tensor.shape)
    if given.shape == tensor.shape:
        return TensorFate(name, shape, "loaded", "same name and shape")
    return TensorFate(name, shape, "resized", f"position table from {tuple(given.shape)}, bicubic")


def _require_same_model(model: nn.Module, source: PretrainedWeights) -> None:
    name = architecture(model)
    # The same network may be registered once more for its larger input.
    if source.model.removesuffix("_384") != name.removesuffix("_384"):
        raise UserError(
            f"init.source {source.path} holds {source.model}, this run's model is {name};"
            f" set model.name={source.model} or choose another source"
        )


def plan_head(source: PretrainedWeights, classes: Sequence[str], wish: str) -> _HeadPlan:
    """Decide for every class of the new run which row of the source's head it takes.

    Args:
        source: its ``classes`` name the rows.
        classes: what the new head's rows shall mean.
        wish: ``auto``, ``keep``, ``slice`` or ``fresh`` (see `InitConfig.head`).

    Raises:
        UserError: ``keep`` with another class hash, or ``slice`` where no class is shared or
            the source does not name its classes.
    """
    count = len(classes)
    rows = {name: row for row, name in enumerate(source.classes)}
    shared = [rows.get(name, -1) for name in classes]
    found = sum(row >= 0 for row in shared)
    same = source.class_hash == class_hash(classes) and bool(source.classes)
    if wish == "keep" and not same:
        raise UserError(
            f"init.head=keep, but the classes of {source.path} (hash {source.class_hash[:12]},"
            f" {source.num_classes} rows) are not this run's (hash {class_hash(classes)[:12]},"
            f" {count}); use init.head=slice or init.head=fresh"
        )
    if wish == "slice" and not found:
        raise UserError(
            f"init.head=slice, but {source.path} knows none of this run's {count} classes"
            f" (first: {classes[0]}); use init.head=fresh"
        )
    if same and wish in ("auto", "keep"):
        return _HeadPlan(tuple(range(count)), "keep", f"head kept: the same {count} classes")
    if found and wish in ("auto", "slice"):
        sentence = f"head sliced by class: {found} of {count} rows from {source.num_classes}"
        return _HeadPlan(tuple(shared), "slice", sentence)
    reason = "as asked" if wish == "fresh" else "no class is shared"
    return _HeadPlan((-1,) * count, "fresh", f"head of {count} classes initialised: {reason}")


def _load_head_tensor(
    name: str, tensor: Tensor, source: PretrainedWeights, plan: _HeadPlan
) -> TensorFate:
    shape = tuple(tensor.shape)
    if plan.kind == "fresh":
        return TensorFate(name, shape, "initialised", plan.sentence)
    given = source.weights.get(name)
    if given is None or given.shape[1:] != tensor.shape[1:] or len(given) <= max(plan.rows):
        found = "is missing" if given is None else f"has shape {tuple(given.shape)}"
        raise UserError(
            f"init.source {source.path}: {name} {found}, this run's is {shape}; use init.head=fresh"
        )
    rows = torch.tensor(plan.rows)
    known = rows >= 0
    tensor[known.to(tensor.device)] = given[rows[known]].to(tensor.device, tensor.dtype)
    if plan.kind == "keep":
        return TensorFate(name, shape, "loaded", "same classes in the same order")
    lost = len(rows) - int(known.sum())
    why = f"{int(known.sum())} rows by class identifier, {lost} initialised"
    return TensorFate(name, shape, "sliced", why)


def _left_out(
    source: PretrainedWeights, plan: _HeadPlan, skip: tuple[str, ...]
) -> list[TensorFate]:
    if plan.kind != "fresh":
        return []
    return [
        TensorFate(name, tuple(tensor.shape), "left out", "the source's head; this run has its own")
        for name, tensor in source.weights.items()
        if name.startswith(skip)
    ]


def _name_classes(
    sentence: str, missing: Sequence[str], classes: Sequence[str], names: Sequence[str]
) -> str:
    if len(missing) != 1 or len(names) != len(classes):
        return sentence
    return f"{sentence}; initialised: {missing[0]} ({names[list(classes).index(missing[0])]})"
