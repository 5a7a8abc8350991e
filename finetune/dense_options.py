"""Options that the programs for detectors and segmentors share; without torch, for --help."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_model(to: argparse.ArgumentParser, run: str) -> None:
    """Add the options that name a model, its weights and a device to the subcommand ``run``."""
    to.set_defaults(run=run)
    to.add_argument("--model", type=Path, required=True, help="a run, checkpoint or export")
    to.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    to.add_argument("--device", default="", help="default: the GPU where there is one")
