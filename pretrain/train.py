"""One rank of pre-training: ``launch/pretrain.sh`` starts it on every rank."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from l2vit import config
from l2vit.train.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pre-training the command line describes.

    Args:
        argv: ``--config FILE [key.sub=value ...]``.

    Returns:
        0 when finished, 75 when a signal stopped it after saving.

    Raises:
        UserError: what a user can mend; ``l2vit.cli.run`` turns it into one line.
    """
    parser = argparse.ArgumentParser(
        prog="pretrain train", description="Pre-train, or continue to, as one rank of a job."
    )
    parser.add_argument("--config", required=True, help="YAML, see pretrain/configs")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args(argv)
    settings = config.load(TrainConfig, options.config, options.overrides)
    from l2vit.train.loop import train  # after the configuration: its errors need not wait

    return train(settings)
