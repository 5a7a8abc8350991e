"""config.json and README.md of an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from finetune import card_data
from finetune.verification import Proof
from l2vit.train.weights import Preprocessing, PretrainedWeights

_CARD = """---
{front_matter}
---
# {title}

{origin}

| | |
|---|---|
| architecture | `{model}` with {arguments} |
| input | {size}×{size}, {crop}, bicubic, mean {mean}, std {std} |
| classes | {classes} ({class_hash}) |
| weights | {weights} |
| paper | {paper} |

## Use
```python
import l2vit, timm  # l2vit registers the architecture with timm
model = timm.create_model("local-dir:THIS_DIRECTORY", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Accuracy
{accuracy}

## Proof
{proof}
`certificate.json` holds the figures and the SHA-256 of every file.

## Training
{training}

## Commands
{commands}

## Limits
{changed}- Made for the classes and the input size above; no other size was measured.
- Probabilities are as trained, with label smoothing and mixing, not calibrated; see the
  calibration error that `finetune.evaluate` reports.
- It inherits what its training pictures show and leave out. Licences of the pictures and of
  released weights apply besides the code's.
"""


def timm_config(
    source: PretrainedWeights, num_features: int, registered: dict[str, Any]
) -> dict[str, Any]:
    """``config.json`` as timm reads it: enough to rebuild, to preprocess and to name answers.

    Args:
        source: of the weights, with the preprocessing to record.
        num_features: channels before the classifier.
        registered: the registered pretrained_cfg of the architecture (first_conv, classifier).
    """
    shown = source.preprocessing
    config: dict[str, Any] = {
        "architecture": source.model,
        "num_classes": source.num_classes,
        "num_features": num_features,
        "model_args": source.model_args,
        "pretrained_cfg": {
            **{k: registered[k] for k in ("first_conv", "classifier") if registered.get(k)},
            "custom_load": False,
            "input_size": [3, shown.input_size, shown.input_size],
            "fixed_input_size": bool(registered.get("fixed_input_size", False)),
            "interpolation": "bicubic",
            "crop_pct": shown.crop_fraction,
            "crop_mode": shown.crop_mode,
            "mean": list(shown.mean),
            "std": list(shown.std),
            "num_classes": source.num_classes,
            "license": card_data.LICENSE,
            **({"tag": card_data.tag(source)} if card_data.tag(source) else {}),
        },
        "training": card_data.without_local_paths(_record(source)),
    }
    whole, inner = card_data.labels(source)
    config["pretrained_cfg"] |= inner
    return config | whole


def _record(source: PretrainedWeights) -> dict[str, Any]:
    return {
        "weights": source.which,
        "class_hash": source.class_hash,
        "recipe": source.training.get("config", {}),
        **{k: v for k, v in source.training.items() if k != "config"},
    }


def card(
    source: PretrainedWeights,
    proof: Proof,
    images: str,
    full: dict[str, Any],
    *,
    out: Path,
    command: str,
) -> str:
    """README.md: recipe, data, accuracy, proof, commands and limits.

    Args:
        source: of the weights.
        proof: on sample pictures.
        images: where these came from, in words.
        full: the accuracy of a whole set, both ways, where it was asked for; else empty.
        out: the exported directory, for the commands.
        command: the one that made this export.
    """
    shown, recipe = source.preprocessing, source.training.get("config", {})
    about = recipe.get("about", {})
    text = _CARD.format(
        front_matter=card_data.front_matter(source, full, title=out.name).rstrip(),
        title=out.name,
        origin=_origin(source),
        model=source.model,
        arguments=json.dumps(source.model_args),
        size=shown.input_size,
        crop=_crop(shown),
        mean=list(shown.mean),
        std=list(shown.std),
        classes=source.num_classes,
        class_hash=f"class hash `{source.class_hash[:12]}`" if source.classes else "not named",
        weights={"ema": "exponential moving average"}.get(source.which, source.which)
        + (f" ({source.choice})" if source.choice else ""),
        paper=about.get("paper") or "-",
        accuracy=_accuracy(source, full),
        proof=_proof(proof, images),
        training=_training(source),
        commands=_commands(about, command, out),
        changed=_changed(source),
    )
    return str(card_data.without_local_paths(text))


def _crop(shown: Preprocessing) -> str:
    """How a picture comes to the input size."""
    side = int(shown.input_size / shown.crop_fraction)
    if shown.crop_mode == "center":
        return f"short side to {side}, centre crop"
    if side == shown.input_size:
        return "whole picture squashed"
    return f"whole picture squashed to {side}×{side}, centre crop"


def _origin(source: PretrainedWeights) -> str:
    if source.kind == "checkpoint":
        step, seen = source.training["step"], source.training["images_seen"]
        return f"Exported from `{source.path}` at step {step:,} ({seen:,} images seen)."
    note = f": {source.note}" if source.note else ""
    return f"Converted from `{source.path.name}` ({source.kind}){note}."


def _accuracy(source: PretrainedWeights, full: dict[str, Any]) -> str:
    lines = []
    if full:
        lines.append(
            f"Measured at export on all {full['count']:,} images of `{full['data']}`: top-1"
            f" {full['top1']:.3f}% ({full['top1_right']:,} right), top-5 {full['top5']:.3f}%; the"
            f" trained model: {full['top1_right_trained']:,} right."
        )
    metrics = source.training.get("metrics", {})
    if metrics:
        found = ", ".join(f"{key} {value:.6g}" for key, value in sorted(metrics.items()))
        lines.append(f"Recorded during training at this checkpoint: {found}.")
    return "\n".join(lines) or "Not measured at export; run the evaluation command below."


def _proof(proof: Proof, images: str) -> str:
    text = (
        f"On {proof.images} real pictures ({images}), loaded by timm in a fresh process, the"
        f" logits differ from the trained model's by at most {proof.largest_difference:.3g};"
        f" all {proof.agree} first answers are the same."
    )
    if proof.labelled:
        text += (
            f" Right among the {proof.labelled} labelled: {proof.trained_right} trained,"
            f" {proof.exported_right} exported."
        )
    return text


def _training(source: PretrainedWeights) -> str:
    recipe = source.training.get("config")
    if not recipe:
        return "Not trained here: see the publication of the weights."
    data = source.training.get("data", {})
    settings = {key: value for key, value in recipe.items() if key != "about"}
    lines = [
        f"- data: manifest hash `{source.training['manifest_hash']}`",
        f"- provenance: {json.dumps(data, ensure_ascii=False)}" if data else "",
        f"- code: git {source.training['git_commit'] or 'not recorded'},"
        f" versions {json.dumps(source.training['versions'])}",
        "- recipe:",
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=96).rstrip(),
        "```",
    ]
    return "\n".join(line for line in lines if line)


def _changed(source: PretrainedWeights) -> str:
    """What the export changed since training, which its recorded accuracy does not cover."""
    recipe = source.training.get("config")
    if not recipe:
        return ""
    before = {
        "input size": (recipe["data"]["input_size"], source.preprocessing.input_size),
        "window": (recipe["model"]["window_size"], source.model_args.get("window_size")),
        "crop fraction": (recipe["eval"]["crop_fraction"], source.preprocessing.crop_fraction),
        "crop mode": (recipe["eval"]["crop_mode"], source.preprocessing.crop_mode),
    }
    changes = [
        f"{name} {old} in training, {new} here"
        for name, (old, new) in before.items()
        if new is not None and old != new
    ]
    if not changes:
        return ""
    return f"- Changed at export: {'; '.join(changes)}. Accuracy from training does not cover it.\n"


def _commands(about: dict[str, Any], command: str, out: Path) -> str:
    lines = [f"    {about['command']}"] if about.get("command") else []
    lines += [f"    {command}", f"    python -m finetune evaluate --model {out} --data SHARDS"]
    return "\n".join(lines)
