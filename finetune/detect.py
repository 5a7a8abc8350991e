"""Detectors: score them, draw what they find, count them, export them.

`python -m finetune.detect evaluate|predict|describe|export`; docs/dense.md has examples. Training:
`bash launch/finetune.sh --config finetune/configs/coco_...yaml`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune import dense_options
from l2vit import cli

_COCO_CLASSES = 80


@cli.program("finetune detect", rank_0_reports=True)
def main(argv: Sequence[str]) -> None:
    """Run the command the command line names."""
    options = _parser().parse_args(argv)
    from finetune import detecting  # torch: not needed for --help

    detecting.COMMANDS[options.run](options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m finetune.detect", __doc__ or "")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    each = commands.add_parser("evaluate", help="COCO's figures on a json and its pictures")
    dense_options.add_model(each, "evaluate")
    each.add_argument("--data", type=Path, help="COCO-style json; default: the run's own val set")
    each.add_argument("--images", type=Path, help="folder of its pictures")
    each.add_argument("--out", type=Path, required=True, help="bbox.json, metrics.json, ...")
    each = commands.add_parser("predict", help="draw boxes, masks and names on pictures")
    dense_options.add_model(each, "predict")
    each.add_argument("--images", type=Path, required=True, help="a folder or a picture")
    each.add_argument("--out", type=Path, required=True, help="folder for the drawings")
    each.add_argument("--least", type=float, default=0.3, help="lowest score drawn (0.3)")
    each = commands.add_parser("describe", help="parameters and operations of a configuration")
    cli.add_config(each)
    each.set_defaults(run="describe")
    each.add_argument("--json", default="", metavar="FILE", help="one line of JSON; - prints it")
    each.add_argument("--classes", type=int, default=_COCO_CLASSES, help="kinds of objects (80)")
    each = commands.add_parser("export", help="weights, settings, card and proof in a folder")
    dense_options.add_model(each, "export")
    each.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
