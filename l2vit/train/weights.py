"""Weights with all one needs to use them, from any place this project knows.

A run directory, one checkpoint in it, a directory exported for timm and one file of weights (as
released by a network's authors, of timm's train.py, of any timm model) all become the same
`PretrainedWeights`. Transfer, evaluation and
export read through here, so a new kind of file is one new function.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

import l2vit  # noqa: F401  registers our models with timm
from l2vit import files
from l2vit.data import labels
from l2vit.data.config import IMAGENET_MEAN, IMAGENET_STD
from l2vit.data.manifest import class_hash
from l2vit.errors import UserError
from l2vit.models import convert
from l2vit.models.families.resize import resize_tables
from l2vit.models.registry import SIZES
from l2vit.train import checkpoint, model

TIMM_CONFIG = "config.json"
TIMM_WEIGHTS = "model.safetensors"
_SQUASHED_FROM = 384
"""L2ViT is evaluated on the whole picture squashed at this size, on a centre crop below."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input when accuracy is measured (always bicubic)."""

    input_size: int = 224
    crop_fraction: float = 0.875
    crop_mode: Literal["center", "squash"] = "center"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class PretrainedWeights:
    """A network's weights, how to build it, what its outputs mean, how to feed it."""

    path: Path
    """What was really read: the checkpoint inside a run, not the run."""
    kind: Literal["checkpoint", "timm", "released"]
    model: str
    """Name in timm's registry after ``import l2vit``."""
    model_args: dict[str, Any]
    """Constructor arguments besides num_classes, window_size among them."""
    weights: dict[str, Tensor]
    """Parameters and buffers by model name, fp32 where floating."""
    which: str
    """raw or ema: which weights of the training run these are."""
    classes: tuple[str, ...]
    """Identifier (wnid) of every output; empty where the source does not say."""
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    note: str = ""
    """What had to be assumed about the source."""
    choice: str = ""
    """Why these weights and no others of the run: the figures of both where there are any."""
    training: dict[str, Any] = field(default_factory=dict)
    """Recipe, data hash, metrics, versions, as recorded; for the model card."""

    @property
    def described(self) -> str:
        """Which weights these are and why."""
        return f"{self.which} weights ({self.choice})" if self.choice else f"{self.which} weights"

    @property
    def class_hash(self) -> str:
        return class_hash(self.classes)

    @property
    def num_classes(self) -> int:
        """Rows of the head, whether or not their classes are known."""
        head = timm.get_pretrained_cfg_value(self.model, "classifier") or "head"
        if f"{head}.weight" not in self.weights:
            raise UserError(f"{self.path} holds no {head}.weight: no classifier of {self.model}")
        return int(self.weights[f"{head}.weight"].shape[0])

    def build(self, *, window_size: int = 0, input_size: int = 0) -> nn.Module:
        """The network with these weights, fp32, on the CPU, in evaluation mode.

        Position tables of another size are resized; standard error names each.

        Args:
            window_size: another window than the source's; 0 keeps it.
            input_size: pixels; only networks with position tables care. 0 keeps the source's.

        Raises:
            UserError: the weights do not fit the network they claim to be; names tensors.
        """
        changed = {"window_size": window_size, "img_size": input_size}
        arguments = {**self.model_args, **{k: v for k, v in changed.items() if v}}
        try:
            model = timm.create_model(self.model, num_classes=self.num_classes, **arguments)
            weights, lines = resize_tables(self.weights, model.state_dict())
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: cannot build {self.model}: {error}") from None
        for line in lines:
            print(f"{self.path}: {line}", file=sys.stderr)
        convert.require_fit(weights, model.state_dict(), where=str(self.path), model=self.model)
        model.load_state_dict(weights)
        return model.eval()


def head_name(model: nn.Module) -> str:
    """The classifier's name inside ``model``, from timm's pretrained_cfg."""
    return str(model.pretrained_cfg["classifier"])  # type: ignore[index]


def architecture(model: nn.Module) -> str:
    """The registry name of a model timm made."""
    return str(model.pretrained_cfg.get("architecture", type(model).__name__))  # type: ignore[union-attr,operator]


def read_pretrained(
    path: Path | str,
    *,
    weights: checkpoint.Weights = "auto",
    model: str = "",
    window_size: int = 0,
    input_size: int = 0,
) -> PretrainedWeights:
    """Read weights from a run, a checkpoint, an exported directory or a released file.

    Args:
        path: a run directory (its newest complete checkpoint is taken, also while the run goes
            on), one checkpoint directory, a directory holding timm's ``config.json``, or a file.
        weights: ``raw``, ``ema`` or ``auto`` (ema where there is one); for training checkpoints.
        model: registry name, for released files that do not tell what they are.
        window_size: for released files: another than they were trained with; 0 keeps it.
        input_size: likewise, in pixels.

    Raises:
        UserError: nothing readable there, or the content contradicts itself; names what.
    """
    path = Path(path)
    if path.name == TIMM_WEIGHTS and path.is_file() and (path.parent / TIMM_CONFIG).is_file():
        return read_timm(path.parent)
    if path.is_file():
        return read_released(
            path, model, weights=weights, window_size=window_size, input_size=input_size
        )
    if not path.is_dir():
        raise UserError(f"no such model: {path} (expected a run, checkpoint, export or file)")
    if (path / TIMM_CONFIG).is_file():
        return read_timm(path)
    return read_checkpoint(path, weights)


def read_checkpoint(path: Path, weights: checkpoint.Weights = "auto") -> PretrainedWeights:
    """A training checkpoint, or the newest complete one of a run (any world size, any stage)."""
    found = checkpoint.find(path)
    try:
        return _read_checkpoint(found, weights)
    except (UserError, OSError):
        newer = checkpoint.find(path)
        if newer == found:
            raise
        return _read_checkpoint(newer, weights)  # the run went on and removed the older one


def _read_checkpoint(found: Path, weights: checkpoint.Weights) -> PretrainedWeights:
    reader = checkpoint.Reader(found)
    meta, choice = reader.meta, reader.choose(weights)
    if class_hash(meta.classes) != meta.class_hash:
        raise UserError(f"{found}: recorded class_hash disagrees with its list of classes")
    config = meta.config
    return PretrainedWeights(
        path=found,
        kind="checkpoint",
        model=config["model"]["name"],
        model_args=_accepted(config["model"], config["data"]["input_size"]),
        weights=checkpoint.read_weights(found, choice.which),
        which=choice.which,
        choice=choice.why,
        classes=tuple(meta.classes),
        class_names=tuple(meta.class_names),
        preprocessing=Preprocessing(
            input_size=config["data"]["input_size"],
            crop_fraction=config["eval"]["crop_fraction"],
            crop_mode=config["eval"]["crop_mode"],
            mean=tuple(config["augment"]["mean"]),
            std=tuple(config["augment"]["std"]),
        ),
        training={
            "config": config,
            "choice": choice.why,
            "step": meta.step,
            "epoch": meta.epoch,
            "images_seen": meta.images_seen,
            "metrics": meta.metrics,
            "manifest_hash": meta.manifest_hash,
            "data": meta.data,
            "git_commit": meta.git_commit,
            "versions": meta.versions,
        },
    )


def _accepted(recorded: Mapping[str, Any], input_size: int) -> dict[str, Any]:
    """Constructor arguments of a recorded run; as there, without what its model does not take."""
    optional = {"window_size": recorded["window_size"], "img_size": input_size}
    name = recorded["name"]
    try:
        with torch.device("meta"):
            given = {"num_classes": 1, **recorded["args"]}
            _, arguments = model.build_with_accepted(name, given, optional)
    except (TypeError, RuntimeError) as error:  # timm raises RuntimeError for an unknown model
        raise UserError(f"model {name}: {error}") from None
    return {key: value for key, value in arguments.items() if key != "num_classes"}


def read_timm(path: Path) -> PretrainedWeights:
    """A directory as ``finetune.export_timm`` (or timm itself) writes it."""
    import safetensors.torch

    config = files.read_json(path / TIMM_CONFIG, what="timm configuration")
    try:
        cfg, name = config["pretrained_cfg"], config["architecture"]
        labels = config.get("label_names") or cfg.get("label_names") or ()
        names = config.get("label_descriptions") or cfg.get("label_descriptions") or {}
        preprocessing = Preprocessing(
            input_size=cfg["input_size"][-1],
            crop_fraction=cfg["crop_pct"],
            crop_mode=cfg["crop_mode"],
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / TIMM_CONFIG} is no timm model configuration ({error})") from error
    arguments = config.get("model_args") or {}
    weights = path / TIMM_WEIGHTS
    if not weights.is_file():
        raise UserError(f"{path} holds no {TIMM_WEIGHTS}; export it again")
    return PretrainedWeights(
        path=path,
        kind="timm",
        model=name,
        model_args={key: value for key, value in arguments.items() if key != "num_classes"},
        weights=safetensors.torch.load_file(weights),
        which=config.get("training", {}).get("weights", "raw"),
        choice=config.get("training", {}).get("choice", ""),
        classes=tuple(labels),
        class_names=tuple(names[label] for label in labels) if names else (),
        preprocessing=preprocessing,
        training=config.get("training", {}),
    )


def read_released(
    path: Path,
    model: str = "",
    *,
    weights: checkpoint.Weights = "auto",
    window_size: int = 0,
    input_size: int = 0,
) -> PretrainedWeights:
    """One file of weights, to be evaluated as its authors do: released by them, saved by timm's
    train.py, or the safetensors of any timm model.

    Without ``model`` it is an L2ViT file, whose variant its shapes tell, or a checkpoint of timm's
    train.py, which says what it holds.

    Raises:
        UserError: an unknown ``model``, or a file that is not of it.
    """
    found = convert.read_released(
        path,
        model,
        ema=None if weights == "auto" else weights == "ema",
        input_size=input_size or None,
        window_size=window_size or None,
    )
    registered: Any = timm.get_pretrained_cfg(found.model)
    size = found.input_size
    crop = (registered.crop_pct, registered.crop_mode)
    if found.model in SIZES and size >= _SQUASHED_FROM:
        crop = (1.0, "squash")
    source = PretrainedWeights(
        path=path,
        kind="released",
        model=found.model,
        model_args=found.model_args,
        weights=found.weights,
        which=found.which,
        classes=(),
        class_names=(),
        preprocessing=Preprocessing(size, *crop, registered.mean, registered.std),
        note="; ".join(found.report),
    )
    return _with_imagenet_classes(source)


def _with_imagenet_classes(source: PretrainedWeights) -> PretrainedWeights:
    """Name the outputs of a released file, which does not: ImageNet's wnids, sorted."""
    count = source.num_classes
    classes = labels.usual_classes(count)
    if not classes:
        note = f"the file does not name its {count} classes"
    else:
        name = "imagenet-1k" if count == 1000 else "imagenet-22k"
        note = f"its {count} outputs are taken to be {name}'s sorted wnids"
    return replace(
        source,
        classes=classes,
        class_names=labels.known_names(classes),
        note="; ".join(filter(None, [source.note, note])),
    )


def no_grad_logits(model: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    """(N, classes) fp32 logits of ``images`` (N, 3, H, W), computed ``batch`` at a time."""
    with torch.inference_mode():
        return torch.cat([model(part).float() for part in images.split(batch)])
