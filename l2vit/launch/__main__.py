"""``python -m l2vit.launch SCRIPT ARGS``: what ``bash launch/pretrain.sh ARGS`` runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from l2vit import cli
from l2vit.launch import command


def main(argv: Sequence[str]) -> int:
    """Launch what ``SCRIPT ARGS`` describes; returns the exit status."""
    return cli.run(lambda: _main(argv), program=f"launch/{Path(argv[0]).name}")


def _main(argv: Sequence[str]) -> int:
    options = command.parse(argv)
    command.check(options.script, options.rest)
    from l2vit.launch import supervisor  # torch: --help and wrong flags need not wait for it

    return supervisor.launch(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
