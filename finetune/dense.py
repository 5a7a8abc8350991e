"""What the programs of detection and segmentation share: models, pictures, exports, proofs.

`python -m finetune.dense EXPORT PICTURES OUT` answers for an export in a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune import formats
from l2vit import cli, config, files
from l2vit.dense import inference
from l2vit.dense.transforms import read_picture
from l2vit.errors import ConfigError, UserError
from l2vit.train import dense_weights, tasks
from l2vit.train.dense_weights import DenseWeights
from l2vit.train.detection import make_network as make_detector
from l2vit.train.distributed import World, from_environment, start
from l2vit.train.segmentation import make_network as make_segmentor

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_PROVEN_ON = 2


def settings_of(source: DenseWeights) -> Any:
    """The configuration a model was trained with, as its class."""
    return config.from_tree(tasks.kind(source.task).settings(), source.settings)


def build(source: DenseWeights, device: torch.device) -> nn.Module:
    """The model with its weights, in evaluation mode, on ``device``."""
    settings = settings_of(source)
    make: Any = make_detector if source.task == "detect" else make_segmentor
    return dense_weights.load_weights(make(settings, len(source.classes)), source).to(device)


def read(path: Path, task: str, weights: Any = "auto") -> DenseWeights:
    """A run, checkpoint or export of ``task``.

    Raises:
        UserError: there is none of that task.
    """
    source = dense_weights.read_dense(path, weights)
    if source.task != task:
        other = {"detect": "finetune.detect", "segment": "finetune.segment"}[source.task]
        raise UserError(f"{source.path} is for python -m {other}")
    return source


def world_of(device: str) -> World:
    """This process among the ranks, on the device asked for; joins the others if there are any."""
    world = from_environment()
    if device:
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"--device {device} cannot be used here: {reason}") from None
        world = World(**{**vars(world), "device": chosen})
    return start(world) if world.size > 1 else world


def pictures_at(path: Path) -> list[Path]:
    """The pictures of a folder, or the one file.

    Raises:
        UserError: none there.
    """
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"no pictures at {path}: give a folder or a file")
    return found


def make_folder(path: Path) -> Path:
    """Create a folder for results."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from None
    return path


def print_count(count: Any, to: str) -> None:
    """A model's parameters and operations as a table, or as one line of JSON (``-``: here)."""
    line = json.dumps(count.to_dict())
    if to == "-":
        print(line)
    elif to:
        files.write_text(Path(to), line + "\n")
    else:
        print(f"{count.parameters / 1e6:.3f} M parameters")
        height, width = count.size
        print(f"{count.multiply_adds / 1e9:.3f} G ({count.convention}) at {height}x{width}")
        for name, part in count.parts.items():
            products = part["products"] / 1e9
            print(f"  {name:10} {part['parameters'] / 1e6:9.3f} M {products:9.3f} G products")


# -- export


def export(source: DenseWeights, out: Path, *, onnx_size: tuple[int, int] | None = None) -> None:
    """Write weights, configuration, card and certificate; the export is proven before it counts.

    Args:
        source: the model.
        out: the directory.
        onnx_size: height and width; of a segmentor also ``model.onnx``, from pictures with values
            in [0, 1] to logits, any batch, checked with onnxruntime.

    Raises:
        UserError: a fresh process, or onnxruntime, answers otherwise than this one.
    """
    import safetensors.torch

    make_folder(out)
    model = build(source, torch.device("cpu"))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    files.write_bytes(out / dense_weights.WEIGHTS_NAME, safetensors.torch.save(weights))
    files.write_json(out / dense_weights.CONFIG_NAME, dense_weights.export_record(source))
    files.write_text(out / "README.md", _card(source))
    proof = _prove(model, source, out)
    names = [dense_weights.WEIGHTS_NAME, dense_weights.CONFIG_NAME, "README.md"]
    if onnx_size is not None:
        name, proof["onnx_largest_difference"] = _write_onnx(model, onnx_size, out)
        names.append(name)
    hashes = {name: files.sha256_file(out / name) for name in names}
    files.write_json(out / "certificate.json", {"proof": proof, "sha256": hashes})
    cli.tell(f"{out}: {proof['pictures']} pictures answered alike by a fresh process")


class _FromPictures(nn.Module):
    """A segmentor from pictures with values in [0, 1] to logits of their size."""

    def __init__(self, segmentor: Any) -> None:
        super().__init__()
        self.segmentor = segmentor

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images - self.segmentor.mean) / self.segmentor.std
        logits: Tensor = self.segmentor.logits(normalised)
        return logits


@torch.no_grad()
def _write_onnx(model: nn.Module, size: tuple[int, int], out: Path) -> tuple[str, float]:
    """Write ``model.onnx``; its name and its largest difference from the model on noise."""
    whole = _FromPictures(model).eval()
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    name, found = formats.onnx(out, whole, images)
    expected = whole(images)
    difference = float((found - expected).abs().max())
    if difference > formats.TOLERANCE * max(1.0, float(expected.abs().max())):
        raise UserError(f"{out / name}: onnxruntime differs by {difference:.3g}")
    return name, difference


def _prove(model: nn.Module, source: DenseWeights, out: Path) -> dict[str, Any]:
    from sklearn.datasets import load_sample_images

    pictures = [
        torch.from_numpy(image[:240, :320].copy()).permute(2, 0, 1).contiguous()
        for image in load_sample_images().images[:_PROVEN_ON]
    ]
    here = dict(answers(model, source.task, pictures))
    there = fresh_answers(out, pictures)
    largest = 0.0
    for name, answer in here.items():
        other = there.get(name)
        if other is None or other.shape != answer.shape:
            raise UserError(f"{out}: a fresh process gives other answers ({name})")
        if answer.numel():
            largest = max(largest, float((other.double() - answer.double()).abs().max()))
    if largest > 1e-3:
        raise UserError(f"{out}: a fresh process differs by {largest:.3g}")
    return {"pictures": len(pictures), "largest_difference": largest, "tensors": len(here)}


def answers(model: nn.Module, task: str, pictures: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What a model says to pictures (3, H, W) of bytes, as named tensors.

    A detector gives its best detections however low they score: there is always something to
    compare.
    """
    if task == "detect":
        scoring: Any = getattr(model, "roi_heads", model)
        scoring.score_thresh = 0.0
    for number, picture in enumerate(pictures):
        if task == "segment":
            yield f"{number}/labels", inference.segment(model, picture)
            continue
        for name, value in inference.detect(model, picture).items():
            yield f"{number}/{name}", value.to(torch.uint8) if value.dtype == torch.bool else value


def fresh_answers(directory: Path, pictures: list[Tensor]) -> Mapping[str, Tensor]:
    """The same from the export at ``directory`` in a fresh process.

    Raises:
        UserError: the process failed; its last line is given.
    """
    import safetensors.torch

    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "in.safetensors"), Path(scratch, "out.safetensors")
        safetensors.torch.save_file({str(n): p for n, p in enumerate(pictures)}, given)
        command = [sys.executable, "-m", "finetune.dense", str(directory), str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"the export {directory} cannot be used: {reason}")
        return safetensors.torch.load_file(out)


def _card(source: DenseWeights) -> str:
    settings = settings_of(source)
    about, head = settings.about, settings.model.head
    metrics = source.training.get("metrics", {})
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    program = {"detect": "finetune.detect", "segment": "finetune.segment"}[source.task]
    return f"""# {settings.model.name}, {head}

{about.paper or "A model of its own."} Expected: {about.expected or "nothing said"}.

- Backbone `{settings.model.name}`, {len(source.classes)} classes, {source.which} weights of step
  {source.training.get("step", "?")}.
- `config.json` holds every setting of the run, `certificate.json` the proof that a fresh process
  answers as the trained model does.

## Measured during training

| figure | value |
|---|---|
{figures or "| none | |"}

## Use

`python -m {program} predict --model THIS_DIRECTORY --images PICTURES --out DIR`
"""


@cli.program("finetune.dense")
def main(argv: Any) -> None:
    """Answer for an export: EXPORT PICTURES OUT."""
    import safetensors.torch

    directory, given, out = map(Path, argv)
    source = dense_weights.read_dense(directory)
    model = build(source, torch.device("cpu"))
    held = safetensors.torch.load_file(given)
    pictures = [held[str(number)] for number in range(len(held))]
    found = {name: value.contiguous() for name, value in answers(model, source.task, pictures)}
    safetensors.torch.save_file(found, out)


def read_all(paths: list[Path]) -> Iterator[tuple[Path, Tensor]]:
    """Each path and its picture."""
    for path in paths:
        yield path, read_picture(path)


if __name__ == "__main__":
    sys.exit(main())
