"""Counts a whole training step without a GPU: launches, gigabytes, copies, FLOPs, roofline time.

    python benchmarks/ledger.py --model l2vit_base --batch 128 --json ledger.json
    python benchmarks/ledger.py --model l2vit_tiny --device a100 engine.zero_stage=2

The model and the augmentation are traced on the meta device, the engine runs on the CPU with
weights of the model's real sizes (l2vit_base: about 3 GB of memory). Figures of the whole step
are those of model and engine; augmentation and mixing stand apart.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"  # the engine is counted on the CPU wherever this runs

from l2vit import config
from l2vit.files import write_json
from l2vit.plan import devices
from l2vit.plan.ledger import Ledger
from l2vit.plan.step_parts import augmentation_parts, engine_part, model_part
from l2vit.train import distributed
from l2vit.train.config import TrainConfig

RECIPE = Path(__file__).resolve().parents[1] / "pretrain" / "configs" / "in22k_base.yaml"


def build(settings: TrainConfig, *, batch: int, classes: int, device: devices.Device) -> Ledger:
    """The ledger of one step of ``settings`` on one rank."""
    world = distributed.start(distributed.from_environment({}))
    try:
        parts = {
            "model": model_part(settings, batch=batch, classes=classes).operations,
            "engine": engine_part(settings, classes=classes, world=world),
            **augmentation_parts(settings, batch=batch, classes=classes),
        }
    finally:
        distributed.stop()
    return Ledger(parts, device, settings.engine.precision != "fp32")


def main() -> None:
    """Print the ledger; write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="l2vit_base", help="a timm name")
    parser.add_argument("--batch", type=int, default=128, help="images of the micro-batch")
    parser.add_argument("--classes", type=int, default=21841)
    parser.add_argument("--device", default="h100", help="h100, h200, a100 or a YAML file")
    parser.add_argument("--config", type=Path, default=RECIPE, help="the run's YAML")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args()
    overrides = [f"model.name={options.model}", *options.overrides]
    settings = config.load(TrainConfig, str(options.config), overrides)
    ledger = build(
        settings,
        batch=options.batch,
        classes=options.classes,
        device=devices.find(options.device),
    )
    print(ledger.text())
    if options.json:
        write_json(options.json, {"batch": options.batch, **ledger.values()})


if __name__ == "__main__":
    main()
