"""Turn a trained model into a directory timm loads, with proof that it is the same model.

`python -m finetune export --checkpoint PATH --out DIR`
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.evaluate import WEIGHTS_HELP
from l2vit import cli


@cli.program("finetune export")
def main(argv: Sequence[str]) -> None:
    """The program; returns its exit status."""
    options = cli.parse(_parser(), argv)
    options.command = shlex.join(["python", "-m", "finetune", "export", *argv])
    from finetune import export  # torch: not needed for --help

    export.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m finetune export", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="run, checkpoint or released file")
    add("--out", required=True, type=Path, help="directory to make")
    add("--model", default="", help="registry name, for released files of other networks")
    add("--window-size", type=int, default=0, help="another window than the trained one")
    add("--input-size", type=int, default=0, help="another input size than the trained one")
    add("--crop-fraction", type=float, default=0.0)
    add("--crop-mode", choices=("center", "squash"))
    add("--weights", choices=("auto", "raw", "ema"), default="auto", help=WEIGHTS_HELP)
    add("--ema", action="store_const", const="ema", dest="weights", help="as --weights ema")
    add("--images", type=Path, help="pictures for the proof; default: the run's data.val")
    add("--proof-images", type=int, default=64, help="how many; 0 for all of them")
    add("--evaluate", type=Path, help="shards or folders: accuracy of all images, both ways")
    add("--onnx", action="store_true", help="also model.onnx, checked with onnxruntime")
    add("--torch-export", action="store_true", help="also model.pt2 (torch.export), checked")
    return parser


if __name__ == "__main__":
    sys.exit(main())
