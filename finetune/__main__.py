"""``python -m finetune``: the programs that use a pre-trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from l2vit import cli

COMMANDS = {
    "train": ("finetune.train", "fine-tune as one rank; launch/finetune.sh starts all of them"),
    "evaluate": ("finetune.evaluate", "exact accuracy on shards or folders of pictures"),
    "export": ("finetune.export_timm", "a directory timm loads, proven to be the same model"),
    "publish": ("finetune.publish", "an exported directory to a repository of Hugging Face's hub"),
    "look": ("finetune.look", "Grad-CAM, attention maps and clamped denominators as pictures"),
    "detect": ("finetune.detect", "score, predict with, describe and export detectors"),
    "segment": ("finetune.segment", "score, predict with, describe and export segmentors"),
}


@cli.program("finetune", rank_0_reports=True)
def main(argv: Sequence[str]) -> int:
    """Run the subcommand the command line names."""
    return cli.commands("python -m finetune", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
