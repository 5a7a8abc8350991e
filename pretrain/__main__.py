"""``python -m pretrain``: the programs around a pre-training run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from l2vit import cli

COMMANDS = {
    "train": ("pretrain.train", "pre-train as one rank; launch/pretrain.sh starts all of them"),
    "plan": ("pretrain.plan", "steps, learning rates, memory, time and cost; starts nothing"),
    "preview": ("pretrain.preview", "an HTML page with the pictures and targets of a batch"),
    "runs": ("pretrain.runs", "how far the runs in a directory have come, and their curves"),
    "report": ("pretrain.report", "the page about one run, at any time"),
    "keys": ("pretrain.keys", "every key of a configuration, one of them, or a section"),
}


@cli.program("pretrain", rank_0_reports=True)
def main(argv: Sequence[str]) -> int:
    """Run the subcommand the command line names."""
    return cli.commands("python -m pretrain", COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
