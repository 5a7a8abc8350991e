"""Fine-tune: `python -m finetune.train --config FILE [key.sub=value ...]`, one process per rank.

`launch/finetune.sh` starts it on every rank. The loop is pre-training's; only the recipe differs:
`init.source` names the weights to begin with, larger inputs and windows are plain settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from l2vit import cli
from l2vit.config import load
from l2vit.train.config import TrainConfig
from l2vit.train.distributed import from_environment
from l2vit.train.transfer import fitting_windows, padding_warnings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fine-tuning the command line describes; returns the exit status."""
    parser = argparse.ArgumentParser(prog="finetune.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML, see finetune/configs")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_intermixed_args(arguments)
    main_rank = from_environment().main
    return cli.run(
        lambda: _train(options.config, options.overrides, main_rank),
        program="finetune",
        report=main_rank,
    )


def _train(path: str, overrides: Sequence[str], main_rank: bool) -> int:
    config = load(TrainConfig, path, overrides)
    warnings = padding_warnings(config.model.name, config.data.input_size, config.model.window_size)
    if warnings and main_rank:
        fitting = fitting_windows(config.data.input_size)
        for line in warnings:
            print(f"finetune: warning: {line}", file=sys.stderr)
        print(
            f"finetune: windows that need no padding at {config.data.input_size}:"
            f" {', '.join(map(str, fitting)) or 'none'}",
            file=sys.stderr,
        )
    from l2vit.train.loop import train

    return train(config)


if __name__ == "__main__":
    sys.exit(main())
