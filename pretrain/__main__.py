"""``python -m pretrain train ...`` and ``python -m pretrain plan ...``."""

from __future__ import annotations

import importlib
import sys

from l2vit import cli
from l2vit.train.distributed import from_environment

USAGE = """usage: python -m pretrain {train,plan} --config FILE [key.sub=value ...]

  train  pre-train as one rank (launch/pretrain.sh starts all of them)
  plan   steps, learning rates, memory, time and cost; starts nothing
"""


def main() -> int:
    """Run the subcommand the command line names."""
    command, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command not in ("train", "plan"):
        print(f"pretrain: error: expected train or plan, found {command!r}", file=sys.stderr)
        print(USAGE, end="", file=sys.stderr)
        return 2
    program = importlib.import_module(f"pretrain.{command}")
    main_rank = command == "plan" or from_environment().main
    return cli.run(lambda: program.main(arguments), program=f"pretrain {command}", report=main_rank)


if __name__ == "__main__":
    sys.exit(main())
