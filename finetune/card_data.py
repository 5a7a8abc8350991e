"""What a published model says of itself to machines: labels, licence, tags and measured figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from timm.data import ImageNetInfo, infer_imagenet_subset

from l2vit.train.weights import PretrainedWeights

LICENSE = "mit"
_DATASETS = {"imagenet1k": "imagenet-1k", "imagenet22k": "imagenet-22k"}
_TAGS = {"imagenet1k": "in1k", "imagenet22k": "in22k"}
_LOCAL_PATH = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/'\"`,;:()\[\]{}]+/)*([^\s/'\"`,;:()\[\]{}]+)")


def front_matter(source: PretrainedWeights, full: Mapping[str, Any], *, title: str) -> str:
    """The YAML that begins a model card, without its dashes.

    Args:
        source: of the weights.
        full: the accuracy of a whole set, where it was measured at export.
        title: the model's name.
    """
    dataset = _dataset(source)
    known = _DATASETS.get(dataset, dataset)
    return ModelCardData(
        license=LICENSE,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "transformers", "l2vit"],
        datasets=[known] if known else None,
        base_model=_base_model(source),
        metrics=["accuracy"],
        model_name=title,
        eval_results=_figures(source, full, known) or None,
    ).to_yaml()


def _dataset(source: PretrainedWeights) -> str:
    return str(source.training.get("data", {}).get("dataset", ""))


def _base_model(source: PretrainedWeights) -> str | None:
    """What was fine-tuned, if that has a name on the hub."""
    began = str(source.training.get("config", {}).get("init", {}).get("source", ""))
    return began if re.fullmatch(r"[\w.-]+/[\w.-]+", began) and "." not in began[:1] else None


def _figures(source: PretrainedWeights, full: Mapping[str, Any], dataset: str) -> list[EvalResult]:
    metrics = source.training.get("metrics", {})
    suffix = "_ema" if source.which == "ema" else ""
    found = {
        f"top-{k}": full.get(f"top{k}", metrics.get(f"val{suffix}/top{k}_percent")) for k in (1, 5)
    }
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset or "images",
            dataset_name=dataset or "own images",
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(float(value), 4),
        )
        for name, value in found.items()
        if value is not None
    ]


def tag(source: PretrainedWeights) -> str:
    """timm's word for what a model was trained on, such as in1k; "" where nothing says it."""
    return _TAGS.get(_dataset(source), "")


def labels(source: PretrainedWeights) -> tuple[dict[str, Any], dict[str, Any]]:
    """Entries of config.json that name the answers: of the whole file, of its pretrained_cfg.

    timm takes identifiers and descriptions from either place. transformers shows the identifiers if
    they are in the first; without them it takes ``id2label``, or for ImageNet's numbers of classes
    its descriptions ("tench, Tinca tinca").
    """
    names: dict[str, Any] = {"label_names": list(source.classes)} if source.classes else {}
    if not source.classes or not source.class_names:
        return names, {}
    described = dict(zip(source.classes, source.class_names, strict=True))
    names["label_descriptions"] = described
    subset = infer_imagenet_subset({"num_classes": len(source.classes)})
    if subset and tuple(ImageNetInfo(subset).label_names()) != source.classes:
        return names, {}  # else transformers would give them ImageNet's names
    return {"id2label": {str(i): name for i, name in enumerate(source.class_names)}}, names


def without_local_paths(value: Any) -> Any:
    """``value`` (of JSON) with absolute paths in its texts cut to their last part."""
    if isinstance(value, str):
        return _LOCAL_PATH.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: without_local_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(item) for item in value]
    return value
