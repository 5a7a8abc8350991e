"""Write the GPU tables of docs/performance.md from the results of blocks A to D.

    python benchmarks/gpu/tables.py                 # benchmarks/results/gpu_*.json into the page
    python benchmarks/gpu/tables.py --print         # only show them

Results of a dry run are refused: they measure nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- GPU tables: begin -->", "<!-- GPU tables: end -->"
Results = dict[str, Any]


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Markdown; numbers to three digits, what is missing as a dash."""
    header = list(header)
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" + " ---: |" * (len(header) - 1)]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.3g}" if isinstance(value, float) and value < 1000 else (
        f"{value:,.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def _failed(found: Any) -> str | None:
    """Why there is no figure, if there is none."""
    if isinstance(found, dict):
        return found.get("error") or found.get("skipped")
    return None


def operators(results: Results) -> str:
    """Each operator's times by each way, forward and backward together."""
    rows = []
    for name, ways in results.items():
        if "ms" in ways or name in ("ceilings", "tests"):
            continue
        cells = [ways.get(way, {}).get("both_ms") for way in ("ours", "pytorch", "compiled")]
        rows.append((name, *cells, _failed(ways) or ""))
    products = [
        (name, found["ms"], found["tflops"]) for name, found in results.items() if "tflops" in found
    ]
    ceilings = results.get("ceilings", {})
    return "\n\n".join(
        (
            f"Copies reach {_cell(ceilings.get('copy_tbs'))} TB/s, a large product"
            f" {_cell(ceilings.get('product_tflops'))} TFLOP/s.",
            table(("forward + backward, ms", "ours", "PyTorch", "compiled", ""), rows),
            table(("product", "ms", "TFLOP/s"), products),
        )
    )


def steps(results: Results) -> str:
    """Whole steps, fastest first."""
    rows = [
        (
            name,
            found.get("images_per_second"),
            None if "mfu" not in found else f"{found['mfu']:.1%}",
            found.get("ms", found.get("step_ms")),
            found.get("host_ms"),
            found.get("peak_gib"),
            _failed(found) or "",
        )
        for name, found in results.items()
        if name not in ("profile", "augmentation")
    ]
    rows.sort(key=lambda row: -(row[1] or 0.0))
    return table(("step", "images/s", "MFU", "ms", "host ms", "peak GiB", ""), rows)


def loading(results: Results) -> str:
    """What the loader does alone and in training."""
    rows = [
        (
            name,
            found.get("works"),
            found.get("per_second", found.get("images_per_second")),
            found.get("data_wait_percent"),
            _failed(found) or found.get("status", ""),
        )
        for name, found in results.items()
    ]
    return table(("loader", "works", "images/s", "waited for data, %", ""), rows)


TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "a_operators": ("Operators", operators),
    "b_model": ("Whole steps", steps),
    "c_engine": ("The engine", steps),
    "d_loader": ("The loader", loading),
}


def page_part(folder: Path) -> str:
    """All tables of which ``folder`` holds results.

    Raises:
        SystemExit: there are none, or they come from a dry run.
    """
    parts = []
    for block, (title, make) in TABLES.items():
        path = folder / f"gpu_{block}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        if found["dry_run"]:
            raise SystemExit(f"{path} comes from a dry run and measures nothing")
        parts.append(
            f"### {title}\n\n{found['device']}, PyTorch {found['torch']}:"
            f" `python benchmarks/gpu/{block}.py`\n\n{make(found['results'])}"
        )
    if not parts:
        raise SystemExit(f"no gpu_*.json in {folder}: run the blocks first")
    return "\n\n".join(parts)


def replaced(page: str, part: str) -> str:
    """``page`` with ``part`` between the two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> None:
    """Print the tables or put them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--print", action="store_true", help="change no file")
    options = parser.parse_args(argv)
    part = page_part(options.results)
    if options.print:
        print(part)
    else:
        options.page.write_text(replaced(options.page.read_text(), part))


if __name__ == "__main__":
    main()
