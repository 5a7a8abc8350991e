"""Write an exported model with its proof: what ``finetune export`` does."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from finetune import card_data, datasets, formats, model_card, sample_images, verification
from finetune.accuracy import Setting, default_device, evaluate_model
from finetune.sample_images import Sample
from l2vit import files
from l2vit.data import labels
from l2vit.errors import ConfigError, UserError
from l2vit.models.padding import padding_warnings
from l2vit.train import history
from l2vit.train.weights import (
    TIMM_CONFIG,
    TIMM_WEIGHTS,
    PretrainedWeights,
    read_pretrained,
)

_NAME = "finetune export"
CERTIFICATE = "certificate.json"
_FORMAT = 1


def run(options: argparse.Namespace) -> None:
    """Export as the options of ``finetune.export_timm`` say."""
    if options.window_size < 0 or options.input_size < 0 or options.proof_images < 0:
        raise ConfigError("--window-size, --input-size and --proof-images must not be negative")
    _require_free(options.out)
    source = read_pretrained(
        options.checkpoint,
        weights=options.weights,
        model=options.model,
        window_size=options.window_size,
        input_size=options.input_size,
    )
    source = _adjusted(source, options)
    if source.note:
        print(f"{_NAME}: note: {source.note}", file=sys.stderr)
    samples, origin = proof_samples(source, options.images, options.proof_images)
    out: Path = options.out.absolute()
    temporary = out.with_name(out.name + files.TEMPORARY_SUFFIX)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _fill(temporary, source, samples, origin, options)
        _replace(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {options.out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    note_in_run(source, options.out)
    print(f"exported {options.out}: {source.model}, {source.described} of {source.path}")


def note_in_run(source: PretrainedWeights, out: Path) -> None:
    """Tell the history of the run that the weights come from, for its report."""
    for place in (source.path, *source.path.parents[:2]):
        if (place / history.NAME).is_file():
            history.append(place, "exported", out=str(out), weights=source.which)
            return


def _require_free(out: Path) -> None:
    """Refuse to replace anything that is not an earlier export."""
    if out.is_file() or (out.exists() and not (out / CERTIFICATE).is_file() and any(out.iterdir())):
        raise UserError(f"{out} exists and is no earlier export; choose another --out")


def _replace(temporary: Path, out: Path) -> None:
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    files.sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _adjusted(source: PretrainedWeights, options: argparse.Namespace) -> PretrainedWeights:
    """The source with the window, size and crop the command line asks for."""
    arguments = dict(source.model_args)
    if options.window_size:
        arguments["window_size"] = options.window_size
    if options.input_size and "img_size" in arguments:
        arguments["img_size"] = options.input_size
    shown = {
        "input_size": options.input_size,
        "crop_fraction": options.crop_fraction,
        "crop_mode": options.crop_mode,
    }
    changed = {key: value for key, value in shown.items() if value}
    return replace(
        source,
        model_args=arguments,
        preprocessing=replace(source.preprocessing, **changed),
        class_names=source.class_names or labels.known_names(source.classes),
    )


def proof_samples(
    source: PretrainedWeights, images: Path | None, count: int
) -> tuple[list[Sample], str]:
    """Pictures for the proof: ``images``, else the run's validation shards, else embedded ones.

    Returns:
        The pictures and where they come from, in words.
    """
    if images is not None:
        return sample_images.samples_at(images, count), str(images)
    val = source.training.get("config", {}).get("data", {}).get("val", "")
    if val and Path(val).is_dir():
        return sample_images.samples_at(Path(val), count), f"from {val}"
    missing = "; the run's are not here" if val else ""
    return sample_images.embedded(), f"scikit-learn's sample photographs{missing}"


def _fill(
    directory: Path,
    source: PretrainedWeights,
    samples: list[Sample],
    origin: str,
    options: argparse.Namespace,
) -> None:
    trained = source.build()
    for line in padding_warnings(trained, source.preprocessing.input_size):
        print(f"{_NAME}: note: {line}", file=sys.stderr)
    write_model(directory, source, trained)
    proof, logits = verification.prove(directory, source, trained, samples)
    certificate: dict[str, Any] = {
        "format": _FORMAT,
        "source": str(source.path),
        "weights": source.which,
        "step": source.training.get("step"),
        "pictures": origin,
        "timm": proof.as_dict(verification.TOLERANCE),
    }
    inputs = verification.inputs_of(source, samples)
    for wanted, make in ((options.onnx, formats.onnx), (options.torch_export, formats.export)):
        if wanted:
            name, answers = make(directory, trained, inputs)
            other = verification.compare(logits, answers, samples, source.classes)
            verification.require(other, name, formats.TOLERANCE)
            certificate[name] = other.as_dict(formats.TOLERANCE)
    full = {}
    if options.evaluate is not None:
        full = evaluate_both(directory, source, trained, options.evaluate)
        certificate["evaluation"] = full
    text = model_card.card(source, proof, origin, full, out=options.out, command=options.command)
    files.write_text(directory / "README.md", text)
    names = sorted(path.name for path in directory.iterdir())
    certificate["sha256"] = {name: files.sha256_file(directory / name) for name in names}
    certificate["versions"] = {"torch": torch.__version__, "timm": timm.__version__}
    files.write_json(directory / CERTIFICATE, card_data.without_local_paths(certificate))
    _print(certificate)


def write_model(directory: Path, source: PretrainedWeights, model: nn.Module) -> None:
    """Write ``model.safetensors`` and ``config.json`` of ``model`` (built from ``source``)."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt"}  # what timm and transformers look for
    data = safetensors.torch.save(tensors, metadata=metadata)
    files.write_bytes(directory / TIMM_WEIGHTS, data)
    registered: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    features = int(model.num_features)  # type: ignore[arg-type]
    config = model_card.timm_config(source, features, registered)
    files.write_json(directory / TIMM_CONFIG, config)


def evaluate_both(
    directory: Path, source: PretrainedWeights, trained: nn.Module, data: Path
) -> dict[str, Any]:
    """Accuracy of the trained and of the exported model on every image of ``data``.

    Raises:
        UserError: they differ in the answer to any image; names the first.
    """
    setting = Setting(device=default_device())
    dataset = datasets.open_dataset(data, source)
    exported = timm.create_model(f"local-dir:{directory.resolve()}", pretrained=True).eval()
    found = []
    for model in (trained, exported):
        model.to(setting.device)
        found.append(evaluate_model(model, dataset, source.preprocessing, setting))
        model.to("cpu")
    before, after = (result.scores for result in found)
    different = (before.answers[:, 0] != after.answers[:, 0]).nonzero()[0]
    if len(different):
        image = dataset.names[int(before.ids[different[0]])]
        raise UserError(
            f"exported and trained model differ on {len(different)} images of {data}, the first is"
            f" {image}; nothing was exported"
        )
    summary = after.summary()
    kept = {
        key: summary[key] for key in ("count", "top1_right", "top5_right", "top1", "top5", "ece")
    }
    return {
        "data": str(data),
        "manifest_hash": dataset.identity,
        **kept,
        "top1_right_trained": before.summary()["top1_right"],
    }


def _print(certificate: dict[str, Any]) -> None:
    proof = certificate["timm"]
    print(
        f"proof on {proof['images']} pictures ({certificate['pictures']}): largest logit difference"
        f" {proof['largest_logit_difference']:.3g}, same first answer on"
        f" {proof['same_first_answer']}, right {proof['top1_right_trained']} trained"
        f" / {proof['top1_right_exported']} exported"
    )
    full = certificate.get("evaluation")
    if full:
        print(
            f"all {full['count']} images of {full['data']}: top-1 {full['top1']:.3f}%,"
            f" {full['top1_right_trained']} right trained / {full['top1_right']} exported"
        )
