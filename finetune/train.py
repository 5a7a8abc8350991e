"""One rank of fine-tuning: ``launch/finetune.sh`` starts it on every rank.

The loop is pre-training's; only the recipe differs: ``init.source`` names the weights to begin
with, larger inputs and windows are plain settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from l2vit import cli
from l2vit.train import checks, tasks
from l2vit.train.config import TrainConfig


@cli.program("finetune train", rank_0_reports=True)
def main(argv: Sequence[str]) -> int:
    """Run the fine-tuning the command line describes.

    Args:
        argv: ``--config FILE [key.sub=value ...]``.

    Returns:
        0 when finished, 75 when a signal stopped it after saving.
    """
    parser = cli.parser(
        "python -m finetune train", "Fine-tune as one rank of a job.", keys_of=TrainConfig
    )
    cli.add_config(parser)
    options = cli.parse(parser, argv)
    settings = tasks.load_config(options.config, options.overrides)
    checks.require_first_weights(settings)
    from l2vit.train.startup import train  # after the configuration: its errors need not wait

    return train(settings)


if __name__ == "__main__":
    sys.exit(main())
