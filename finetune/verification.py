"""Prove that an exported directory is the trained model, in a process with only l2vit and timm."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import l2vit
from finetune.datasets import transform
from finetune.sample_images import Sample
from l2vit.errors import UserError
from l2vit.train.weights import PretrainedWeights, no_grad_logits

TOLERANCE = 1e-5
"""Largest difference between logits, as a share of the largest logit (at least 1)."""
BATCH = 32
_FOREIGN = ("deepspeed", "nvidia", "webdataset", "finetune", "pretrain", "data_prep")

# What a user of the exported model would write: it imports l2vit and timm (and what they need).
_CHILD = """
import sys
import l2vit, timm
import timm.data, torch
from pathlib import Path
from PIL import Image
directory, pictures, out, threads, batch = sys.argv[1:]
torch.set_num_threads(int(threads))
model = timm.create_model("local-dir:" + directory, pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
show = timm.data.create_transform(**config, is_training=False)
files = sorted(Path(pictures).iterdir())
inputs = torch.stack([show(Image.open(file).convert("RGB")) for file in files])
with torch.inference_mode():
    logits = torch.cat([model(part) for part in inputs.split(int(batch))])
modules = sorted({name.partition(".")[0] for name in sys.modules})
torch.save({"logits": logits, "modules": modules}, out)
"""


@dataclass(frozen=True)
class Proof:
    """How the exported model's answers compare with the trained model's on real pictures."""

    images: int
    largest_difference: float
    largest_logit: float
    agree: int
    """Pictures with the same first answer."""
    labelled: int
    """Pictures whose class is known."""
    trained_right: int
    exported_right: int

    def allowed(self, tolerance: float) -> float:
        """The largest difference that passes: ``tolerance`` of the largest logit, at least 1."""
        return tolerance * max(1.0, self.largest_logit)

    def as_dict(self, tolerance: float) -> dict[str, Any]:
        """For the certificate."""
        return {
            "images": self.images,
            "largest_logit_difference": self.largest_difference,
            "largest_logit": self.largest_logit,
            "tolerance": self.allowed(tolerance),
            "same_first_answer": self.agree,
            "labelled_images": self.labelled,
            "top1_right_trained": self.trained_right,
            "top1_right_exported": self.exported_right,
        }


def inputs_of(source: PretrainedWeights, samples: Sequence[Sample]) -> Tensor:
    """(N, 3, H, W) fp32: the pictures as the trained model's evaluation shows them."""
    show = transform(source.preprocessing)
    return torch.stack([show(sample.picture()) for sample in samples])


def fresh_logits(directory: Path, samples: Sequence[Sample]) -> Tensor:
    """(N, classes) logits of the exported model, from encoded pictures, in a fresh process.

    Raises:
        UserError: the process failed (its last line is given) or imported our other packages.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pictures, out = Path(scratch, "pictures"), Path(scratch, "out.pt")
        pictures.mkdir()
        for number, sample in enumerate(samples):
            (pictures / f"{number:08d}").write_bytes(sample.data)
        library = str(Path(l2vit.__file__).parents[1])
        paths = [library, *filter(None, [os.environ.get("PYTHONPATH")])]
        threads = str(torch.get_num_threads())
        options = [str(directory.resolve()), str(pictures), str(out), threads, str(BATCH)]
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, *options],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"timm cannot use the exported directory {directory}: {reason}")
        result = torch.load(out, weights_only=True)
    foreign = sorted(set(_FOREIGN) & set(result["modules"]))
    if foreign:
        raise UserError(f"the exported model needs more than l2vit and timm: {', '.join(foreign)}")
    logits: Tensor = result["logits"]
    return logits


def compare(
    trained: Tensor, other: Tensor, samples: Sequence[Sample], classes: Sequence[str]
) -> Proof:
    """Count and measure the differences between two models' logits (N, classes)."""
    if trained.shape != other.shape:
        raise UserError(f"logits differ in shape: {tuple(trained.shape)}, {tuple(other.shape)}")
    place = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([place.get(sample.label, -1) for sample in samples])
    first, second = trained.argmax(1), other.argmax(1)
    return Proof(
        images=len(samples),
        largest_difference=float((trained - other).abs().max()),
        largest_logit=float(trained.abs().max()),
        agree=int((first == second).sum()),
        labelled=int((labels >= 0).sum()),
        trained_right=int((first == labels).sum()),
        exported_right=int((second == labels).sum()),
    )


def prove(
    directory: Path, source: PretrainedWeights, model: nn.Module, samples: Sequence[Sample]
) -> tuple[Proof, Tensor]:
    """Compare the exported ``directory`` with the trained ``model`` on ``samples``.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``.
        source: of the trained model; its own preprocessing is used on our side.
        model: the trained model, built from ``source`` and not from ``directory``.
        samples: encoded pictures.

    Returns:
        The proof and the trained model's logits (N, classes).

    Raises:
        UserError: the logits or one first answer differ; says by how much.
    """
    trained = no_grad_logits(model, inputs_of(source, samples), BATCH)
    if not bool(torch.isfinite(trained).all()):
        raise UserError(f"{source.path}: the trained model's logits are not finite; not exported")
    proof = compare(trained, fresh_logits(directory, samples), samples, source.classes)
    require(proof, "the exported model", TOLERANCE)
    return proof, trained


def require(proof: Proof, what: str, tolerance: float) -> None:
    """Raise UserError unless the difference is within ``tolerance`` and all answers agree."""
    allowed = proof.allowed(tolerance)
    if not proof.largest_difference <= allowed or proof.agree != proof.images:
        raise UserError(
            f"{what} is not the trained one: logits differ by {proof.largest_difference:.3g}"
            f" (allowed {allowed:.3g}), {proof.images - proof.agree} of {proof.images} first"
            " answers differ; nothing was exported"
        )
