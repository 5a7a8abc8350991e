"""First weights and finished weights of detectors and segmentors.

A run, one of its checkpoints and an exported directory all become the same `DenseWeights`. A run
that starts from a classifier takes its backbone; one that starts from another detector or
segmentor takes all that fits, rows of classes by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2vit import files
from l2vit.dense.config import DetectorConfig, SegmentorConfig
from l2vit.errors import UserError
from l2vit.models.convert import require_fit
from l2vit.models.families.resize import resize_tables
from l2vit.train import checkpoint
from l2vit.train.config import InitConfig
from l2vit.train.transfer import TensorFate, TransferReport
from l2vit.train.weights import read_pretrained

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
TASKS = ("detect", "segment")
_BODY = "levels.body.model."


@dataclass(frozen=True)
class DenseWeights:
    """A detector's or segmentor's weights and all one needs to build it."""

    path: Path
    task: str
    settings: dict[str, Any]
    """The run's configuration as mappings."""
    weights: dict[str, Tensor]
    which: str
    """raw or ema."""
    classes: tuple[str, ...]
    """Names of the classes."""
    training: dict[str, Any] = field(default_factory=dict)
    """Step, metrics, data and versions, as recorded."""


def is_dense(path: Path) -> bool:
    """Whether a detector or segmentor is at ``path``, and not a classifier."""
    if (path / CONFIG_NAME).is_file():
        return files.read_json(path / CONFIG_NAME, what="configuration").get("task") in TASKS
    if not path.is_dir():
        return False
    try:
        meta = checkpoint.read_meta(checkpoint.find(path))
    except UserError:
        return False
    return meta.config.get("task") in TASKS


def read_dense(path: Path, weights: checkpoint.Weights = "auto") -> DenseWeights:
    """Read a run, a checkpoint or an exported directory.

    Raises:
        UserError: nothing of that kind there.
    """
    if (path / CONFIG_NAME).is_file():
        return _read_export(path)
    if not path.is_dir():
        raise UserError(f"no such model: {path} (expected a run, checkpoint or export)")
    found = checkpoint.find(path)
    reader = checkpoint.Reader(found)
    meta = reader.meta
    if meta.config.get("task") not in TASKS:
        raise UserError(f"{found} holds a classifier, neither a detector nor a segmentor")
    which = reader.choose(weights).which
    return DenseWeights(
        path=found,
        task=meta.config["task"],
        settings=meta.config,
        weights=checkpoint.read_weights(found, which),
        which=which,
        classes=tuple(meta.class_names),
        training={
            "step": meta.step,
            "images_seen": meta.images_seen,
            "metrics": meta.metrics,
            "data": meta.data,
            "git_commit": meta.git_commit,
            "versions": meta.versions,
        },
    )


def _read_export(path: Path) -> DenseWeights:
    import safetensors.torch

    told = files.read_json(path / CONFIG_NAME, what="configuration")
    if told.get("task") not in TASKS:
        raise UserError(f"{path} holds a classifier, neither a detector nor a segmentor")
    try:
        weights = safetensors.torch.load_file(path / WEIGHTS_NAME)
        return DenseWeights(
            path=path,
            task=told["task"],
            settings=told["settings"],
            weights=weights,
            which=told["weights"],
            classes=tuple(told["classes"]),
            training=told["training"],
        )
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a whole export: {error}") from None


def export_record(source: DenseWeights) -> dict[str, Any]:
    """What ``config.json`` of an export holds; ``read_dense`` reads it again."""
    return {
        "task": source.task,
        "classes": list(source.classes),
        "weights": source.which,
        "settings": source.settings,
        "training": source.training,
    }


# -- first weights


def load_initial(
    network: nn.Module,
    init: InitConfig,
    *,
    model: DetectorConfig | SegmentorConfig,
    classes: Sequence[str],
) -> TransferReport:
    """Load ``init.source`` into a fresh detector or segmentor and say what became of each tensor.

    Args:
        network: freshly initialised.
        init: where from, and what to do with the class outputs of another detector.
        model: the settings of ``network``.
        classes: names of the classes.

    Raises:
        UserError: the source does not fit; names the source and the tensor.
    """
    path = Path(init.source)
    if is_dense(path):
        return _from_dense(network, read_dense(path, init.weights), init, model, classes)
    return _from_classifier(network, init, model.name, classes)


def _from_classifier(
    network: nn.Module, init: InitConfig, backbone: str, classes: Sequence[str]
) -> TransferReport:
    source = read_pretrained(init.source, weights=init.weights, model=backbone)
    if source.model.removesuffix("_384") != backbone.removesuffix("_384"):
        raise UserError(
            f"init.source {source.path} holds {source.model}, this run's backbone is {backbone}"
        )
    own = network.state_dict()
    place = next(name for name in own if _BODY in name).partition(_BODY)[0] + _BODY
    body = {name.removeprefix(place): t for name, t in own.items() if name.startswith(place)}
    try:
        given, _ = resize_tables({k: v for k, v in source.weights.items() if k in body}, body)
    except ValueError as error:
        raise UserError(f"init.source {source.path} does not fit this run: {error}") from None
    for name, tensor in body.items():
        if name not in given or given[name].shape != tensor.shape:
            raise UserError(f"init.source {source.path}: {name} is missing or has another shape")
    fates = []
    with torch.no_grad():
        for name, tensor in own.items():
            inner = name.removeprefix(place)
            if name.startswith(place):
                tensor.copy_(given[inner])
                fates.append(_fate(name, tensor, "loaded", "the backbone's"))
            else:
                why = "level norm, neck or head: this run's own"
                fates.append(_fate(name, tensor, "initialised", why))
    fates += [
        _fate(name, tensor, "left out", "the classifier or its final norm")
        for name, tensor in source.weights.items()
        if name not in body
    ]
    sentence = f"heads of {len(classes)} classes initialised"
    return _report(source.path, source.which, backbone, sentence, fates, source.note)


def _from_dense(
    network: nn.Module,
    source: DenseWeights,
    init: InitConfig,
    model: DetectorConfig | SegmentorConfig,
    classes: Sequence[str],
) -> TransferReport:
    backbone, head = model.name, model.head
    rows = _class_rows(source, init, classes)
    own = network.state_dict()
    where = f"init.source {source.path}"
    if source.settings["model"]["head"] != head:
        raise UserError(
            f"{where} is a {source.settings['model']['head']}, this run a {head}: start from its"
            " kind, or from a classifier"
        )
    outputs = class_outputs(network, len(classes))
    skip = tuple(outputs)
    require_fit(source.weights, own, where=where, model=backbone, skip=skip)
    fates = []
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in outputs:
                tensor.copy_(source.weights[name])
                fates.append(_fate(name, tensor, "loaded", "same name and shape"))
                continue
            kept = _copy_rows(tensor, source, name, outputs[name], rows)
            fate, why = ("sliced", f"{kept} classes by name") if kept else ("initialised", "fresh")
            fates.append(_fate(name, tensor, fate, why))
    found = sum(row >= 0 for row in rows)
    sentence = f"class outputs: {found} of {len(classes)} from the source's {len(source.classes)}"
    return _report(source.path, source.which, backbone, sentence, fates, "")


def _class_rows(source: DenseWeights, init: InitConfig, classes: Sequence[str]) -> list[int]:
    """For every class of this run its place in the source; -1: initialised."""
    place = {name: row for row, name in enumerate(source.classes)}
    rows = [place.get(name, -1) for name in classes]
    same = tuple(classes) == source.classes
    if init.head == "keep" and not same:
        raise UserError(f"init.head=keep, but the classes of {source.path} are not this run's")
    if init.head == "slice" and max(rows) < 0:
        raise UserError(f"init.head=slice, but {source.path} knows none of this run's classes")
    return [-1] * len(classes) if init.head == "fresh" else rows


def class_outputs(network: nn.Module, classes: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Tensors with rows for classes, and how each is seen as (..., outputs, ...) with dim 1 them.

    A detector's outputs may begin with the background.
    """

    def anchors_by_class(tensor: Tensor) -> Tensor:
        return tensor.view(-1, classes, *tensor.shape[1:])

    def classes_by_box(tensor: Tensor) -> Tensor:
        return tensor.view(1, -1, 4, *tensor.shape[1:])

    def one_each(tensor: Tensor) -> Tensor:
        return tensor[None]

    kinds: dict[str, Any] = {
        "cls_logits": anchors_by_class if not hasattr(network, "rpn") else None,
        "box_predictor.cls_score": one_each,
        "box_predictor.bbox_pred": classes_by_box,
        "mask_fcn_logits": one_each,
    }
    if hasattr(network, "auxiliary"):
        kinds = {"head.1": one_each, "auxiliary.4": one_each}
    found = {}
    for name in network.state_dict():
        module = name.rpartition(".")[0]
        for ending, view in kinds.items():
            if view is not None and module.endswith(ending):
                found[name] = view
    return found


def _copy_rows(
    tensor: Tensor,
    source: DenseWeights,
    name: str,
    view: Callable[[Tensor], Tensor],
    rows: Sequence[int],
) -> int:
    """Copy the outputs of known classes, and the background's; how many classes were known."""
    known = [k for k, row in enumerate(rows) if row >= 0]
    given = source.weights.get(name)
    if not known or given is None:
        return 0
    into = view(tensor)
    background = into.shape[1] - len(rows)
    per_class = len(given) // (len(source.classes) + background)
    shape = (into.shape[0], len(source.classes) + background, *into.shape[2:])
    if per_class * (len(source.classes) + background) != len(given) or (
        given.numel() != torch.Size(shape).numel()
    ):
        raise UserError(
            f"init.source {source.path}: {name} has shape {tuple(given.shape)}; use init.head=fresh"
        )
    given = given.view(shape)
    into[:, :background] = given[:, :background]
    for k in known:
        into[:, background + k] = given[:, background + rows[k]]
    return len(known)


def _fate(name: str, tensor: Tensor, fate: Any, why: str) -> TensorFate:
    return TensorFate(name, tuple(tensor.shape), fate, why)


def _report(
    path: Path,
    which: str,
    backbone: str,
    head: str,
    fates: Sequence[TensorFate],
    note: str,
) -> TransferReport:
    return TransferReport(str(path), which, backbone, head, (), note, tuple(fates))


def load_weights(network: nn.Module, source: DenseWeights) -> nn.Module:
    """``network`` with the weights of ``source``, in evaluation mode.

    Raises:
        UserError: they do not fit; names the tensors.
    """
    weights: Mapping[str, Tensor] = source.weights
    name = source.settings["model"]["name"]
    require_fit(weights, network.state_dict(), where=str(source.path), model=name)
    network.load_state_dict(weights)
    return network.eval()
