"""``python -m pretrain report RUN``: the page about one run, finished, stopped or under way."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from l2vit import cli, files
from l2vit.errors import UserError


@cli.program("pretrain report")
def main(argv: Sequence[str]) -> None:
    """Write the page the command line asks for."""
    parser = cli.parser(
        "python -m pretrain report",
        "One HTML file about a run: what it was, how it went, what came of it. Training writes it\n"
        "at its end; this draws it at any time. With RUN/plan.json (what `plan --json` printed)\n"
        "the prediction stands beside what happened.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    options = cli.parse(parser, argv)
    from l2vit.train import report  # not needed for --help
    from l2vit.train.run_record import RunRecord

    record = RunRecord.load(options.run)
    if not (record.records or record.history or record.config):
        raise UserError(f"{options.run} is no run directory: it holds no record of a run")
    out = options.out or options.run / report.NAME
    files.write_text(out, report.page(record))
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
