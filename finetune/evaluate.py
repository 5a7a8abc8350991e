"""Exact accuracy of a run, a checkpoint or an exported model on shards or class folders.

`python -m finetune evaluate --model PATH --data SHARDS [--input-size N] [--json FILE]`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from l2vit import cli

LABEL_SETS = ("data", "real", "imagenet-v2", "imagenet-a", "imagenet-r")
WEIGHTS_HELP = "of a checkpoint; auto: the better of both on data.val, else the EMA"


@cli.program("finetune evaluate")
def main(argv: Sequence[str]) -> None:
    """The program; returns its exit status."""
    options = cli.parse(_parser(), argv)
    from finetune import accuracy  # torch: not needed for --help

    accuracy.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m finetune evaluate", __doc__)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="exported directory, run, checkpoint or file")
    add("--data", required=True, type=Path, help="shard directory, or a folder per class")
    add("--name", default="", help="registry name, for released files of other networks")
    add("--weights", choices=("auto", "raw", "ema"), default="auto", help=WEIGHTS_HELP)
    add(
        "--knn",
        type=Path,
        metavar="TRAIN",
        help="score the features instead of the classifier: by"
        " nearest neighbours among the pictures of TRAIN",
    )
    add("--neighbours", type=int, default=20, help="for --knn (default 20)")
    add("--label-set", choices=LABEL_SETS, default="data")
    add("--input-size", type=int, default=0, help="pixels; default: as the model was exported")
    add("--window-size", type=int, default=0)
    add("--crop-fraction", type=float, default=0.0)
    add("--crop-mode", choices=("center", "squash"))
    add("--backend", choices=("pil", "dali", "host"), default="pil", help="pil: as timm decodes")
    add("--batch", type=int, default=64)
    add("--threads", type=int, default=2)
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--device", default="")
    add("--json", type=Path, help="all figures, per class too")
    add("--picture", type=Path, help="PNG: worst classes' confusion and reliability curve")
    add("--predictions", type=Path, help="CSV: one line an image")
    return parser


if __name__ == "__main__":
    sys.exit(main())
