"""``python -m pretrain runs DIR``: how far each run in a directory has come."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from l2vit import cli, files


@cli.program("pretrain runs")
def main(argv: Sequence[str]) -> None:
    """Print the table, or write the page, the command line asks for."""
    parser = cli.parser(
        "python -m pretrain runs", "State, step, time left, accuracy and speed of runs."
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="of runs, at any depth")
    parser.add_argument("--json", action="store_true", help="print values for programs")
    parser.add_argument("--page", type=Path, metavar="FILE", help="HTML: curves over one another")
    options = cli.parse(parser, argv)
    from l2vit.train import runs  # not needed for --help

    found = runs.find(options.directory)
    if options.page:
        files.write_text(options.page, runs.page(found))
    now = time.time()
    print(json.dumps([r.as_dict(now) for r in found]) if options.json else runs.table(found))


if __name__ == "__main__":
    sys.exit(main())
