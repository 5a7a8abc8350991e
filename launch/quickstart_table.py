"""The last page of launch/quickstart.sh: what it measured, and where the results lie."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REQUIRED_TOP1 = 97.0
"""Percent of validation digits; the quickstart fails below it."""


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _last(run: Path, key: str) -> float:
    return [record[key] for record in _records(run) if key in record][-1]


def _share(accuracy: dict[str, Any]) -> str:
    return f"{accuracy['top1']:.2f}%  ({accuracy['top1_right']} of {accuracy['count']})"


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if the exported model disagrees with the run or is not good enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=int, required=True)
    options = parser.parse_args(arguments)
    out: Path = options.directory
    train, val = (
        json.loads((out / f"shards/{s}/manifest.json").read_text()) for s in ("train", "val")
    )
    run, timm = (json.loads((out / f"{n}_accuracy.json").read_text()) for n in ("run", "timm"))

    table = Table(title="The pipeline, once through", show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    images = f"{train['samples']:,} + {val['samples']:,} held out"
    table.add_row("images sharded", images, str(out / "shards"))
    for stage in ("pretrain", "finetune"):
        table.add_row(f"{stage} loss", f"{_last(out / stage, 'loss'):.4f}", str(out / stage))
    pretrained = f"{_last(out / 'pretrain', 'val/top1_percent'):.2f}%"
    table.add_row("pretrain accuracy, 64 pixels", pretrained, str(out / "pretrain/report.html"))
    table.add_row("fine-tuned accuracy, 96 pixels", _share(run), str(out / "run_accuracy.json"))
    table.add_row("timm accuracy of the export", _share(timm), str(out / "timm"))
    table.add_row("time, set-up included", f"{options.seconds} s", f"tensorboard --logdir {out}")
    Console(width=max(110, Console().width)).print(table)

    if timm["top1_right"] != run["top1_right"] or timm["count"] != run["count"]:
        print("quickstart: error: the exported model and the run disagree", file=sys.stderr)
        return 1
    if timm["top1"] < REQUIRED_TOP1:
        print(f"quickstart: error: {timm['top1']:.2f}% is below {REQUIRED_TOP1}%", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
