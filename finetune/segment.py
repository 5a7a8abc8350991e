"""Segmentors: score them, draw what they see, count them, export them.

`python -m finetune.segment evaluate|predict|describe|export`; docs/dense.md has examples. Training:
`bash launch/finetune.sh --config finetune/configs/ade20k_...yaml`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune import dense_options
from l2vit import cli


@cli.program("finetune segment", rank_0_reports=True)
def main(argv: Sequence[str]) -> None:
    """Run the command the command line names."""
    options = _parser().parse_args(argv)
    from finetune import segmenting  # torch: not needed for --help

    segmenting.COMMANDS[options.run](options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m finetune.segment", __doc__ or "")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    each = commands.add_parser("evaluate", help="mean IoU on pictures with label maps")
    dense_options.add_model(each, "evaluate")
    each.add_argument("--images", type=Path, help="pictures; default: the run's own val set")
    each.add_argument("--labels", type=Path, help="folder of their label maps")
    each.add_argument("--out", type=Path, required=True, help="folder for metrics.json")
    each.add_argument("--mode", choices=("whole", "slide"), help="default: as the run evaluates")
    each.add_argument(
        "--save-labels", action="store_true", help="answers as PNG, classes from 1 as ADE20K's"
    )
    each = commands.add_parser("predict", help="colour pictures by class")
    dense_options.add_model(each, "predict")
    each.add_argument("--images", type=Path, required=True, help="a folder or a picture")
    each.add_argument("--out", type=Path, required=True, help="folder for the drawings")
    each = commands.add_parser("describe", help="parameters and operations of a configuration")
    cli.add_config(each)
    each.set_defaults(run="describe")
    each.add_argument("--json", default="", metavar="FILE", help="one line of JSON; - prints it")
    each = commands.add_parser("export", help="weights, settings, card and proof in a folder")
    dense_options.add_model(each, "export")
    each.add_argument(
        "--onnx", type=_size, metavar="HxW", help="also model.onnx for pictures of this size"
    )
    each.add_argument("--out", type=Path, required=True)
    return parser


def _size(text: str) -> tuple[int, int]:
    """(height, width) of ``512x512``; both must divide by 32, the last stage's stride."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 512x512")
    if int(height) % 32 or int(width) % 32 or not int(height) or not int(width):
        raise argparse.ArgumentTypeError(f"{text}: height and width must divide by 32")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
