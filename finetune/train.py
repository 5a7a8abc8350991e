"""One rank of fine-tuning: ``launch/finetune.sh`` starts it on every rank.

The loop is pre-training's; only the recipe differs: ``init.source`` names the weights to begin
with, larger inputs and windows are plain settings.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from l2vit import cli, config
from l2vit.train import checks
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
    settings = config.load(TrainConfig, options.config, options.overrides)
    checks.require_first_weights(settings)
    if cli.is_rank_0():
        _warn_of_padding(settings)
    from l2vit.train.loop import train  # after the configuration: its errors need not wait

    return train(settings)


def _warn_of_padding(settings: TrainConfig) -> None:
    from l2vit.train.transfer import fitting_windows, padding_warnings

    size = settings.data.input_size
    warnings = padding_warnings(settings.model.name, size, settings.model.window_size)
    for line in warnings:
        cli.tell(f"finetune train: warning: {line}", error=True)
    if warnings:
        fitting = ", ".join(map(str, fitting_windows(size))) or "none"
        cli.tell(f"finetune train: windows without padding at {size}: {fitting}", error=True)


if __name__ == "__main__":
    sys.exit(main())
