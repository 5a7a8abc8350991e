"""Look at a trained model: Grad-CAM, attention maps of every layer, clamped denominators.

`python -m finetune look --model DIR --images PATH [--out DIR]`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.evaluate import WEIGHTS_HELP
from l2vit import cli


@cli.program("finetune look")
def main(argv: Sequence[str]) -> None:
    """The program; returns its exit status."""
    options = cli.parse(_parser(), argv)
    from finetune import figures  # torch: not needed for --help

    figures.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m finetune look", __doc__)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="exported directory, run, checkpoint or file")
    add("--images", type=Path, help="shards, a folder or a picture; default: two photographs")
    add("--name", default="", help="registry name, for released files of other networks")
    add("--weights", choices=("auto", "raw", "ema"), default="auto", help=WEIGHTS_HELP)
    add("--count", type=int, default=6, help="pictures shown")
    add("--layer", default="", help="module for Grad-CAM; default: the last stage")
    add("--class", dest="wanted", default="", help="class to explain; default: the answer")
    add("--max-tokens", type=int, default=4096, help="larger attention maps are left out")
    add("--out", type=Path, default=Path("look"), help="directory for the pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
