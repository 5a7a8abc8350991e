"""One rank of pre-training: ``launch/pretrain.sh`` starts it on every rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from l2vit import cli
from l2vit.train import tasks
from l2vit.train.config import TrainConfig


@cli.program("pretrain train", rank_0_reports=True)
def main(argv: Sequence[str]) -> int:
    """Run the pre-training the command line describes.

    Args:
        argv: ``--config FILE [key.sub=value ...]``.

    Returns:
        0 when finished, 75 when a signal stopped it after saving.
    """
    parser = cli.parser(
        "python -m pretrain train",
        "Pre-train, or continue to, as one rank of a job.",
        keys_of=TrainConfig,
    )
    cli.add_config(parser)
    options = cli.parse(parser, argv)
    settings = tasks.load_config(options.config, options.overrides)
    from l2vit.train.startup import train  # after the configuration: its errors need not wait

    return train(settings)


if __name__ == "__main__":
    sys.exit(main())
