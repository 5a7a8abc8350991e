"""The four GPU blocks run dry on a CPU, so that they cannot rot; their tables from results."""

import gzip
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("a_operators", ["ceilings", "tests", "depthwise 7x7 at 7", "window attention 12 at 12"]),
        ("b_model", ["l2vit_mini 2 eager", "l2vit_mini 2 eager without our kernels", "profile"]),
        ("c_engine", ["2 x 2 ZeRO-1", "2 x 2 ZeRO-2", "augmentation"]),
        pytest.param(
            *(
                "d_loader",
                ["region decode, hardware 0.0", "alone, 1 threads", "training, 1 threads"],
            ),
            marks=pytest.mark.ci,
        ),
    ],
)
def test_dry_run(block, expected, tmp_path):
    command = [sys.executable, str(GPU / f"{block}.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / f"gpu_{block}.json").read_text())
    assert found["dry_run"] and set(expected) <= set(found["results"])
    assert not any("error" in r for r in found["results"].values() if isinstance(r, dict))
    if block == "d_loader":
        with gzip.open(tmp_path / found["results"]["training, 1 threads"]["trace"]) as trace:
            names = {event.get("name") for event in json.load(trace)["traceEvents"]}
        assert "aten::convolution" in names


def test_no_block_starts_anything_after_nine_minutes():
    assert runpy.run_path(str(GPU / "measuring.py"))["MINUTES"] <= 9


RESULTS = {
    "a_operators": {
        "ceilings": {"copy_tbs": 3.01, "product_tflops": 798.4},
        "tests": {"status": 0, "last": ["12 passed"]},
        "depthwise 7x7 at 56": {
            way: {"forward_ms": 1.0, "both_ms": ms} for way, ms in (("ours", 2.5), ("pytorch", 9.0))
        },
        "linear attention at 56": {"error": "RuntimeError: out of resource"},
        "product qkv at 56": {"ms": 1.25, "tflops": 650.0},
    },
    "b_model": {
        "l2vit_base 128 eager": {"ms": 80.0, "images_per_second": 1600.0, "mfu": 0.154},
        "l2vit_base 128 compiled": {"ms": 50.0, "images_per_second": 2560.0, "mfu": 0.247},
        "vit_base_patch16_224 64 compiled": {"skipped": "out of time"},
        "profile": [],
    },
}


def write(folder, *, dry):
    for block, results in RESULTS.items():
        found = {"dry_run": dry, "device": "H100", "torch": "2.11", "results": results}
        (folder / f"gpu_{block}.json").write_text(json.dumps(found))


def test_tables_of_the_page(tmp_path):
    tables = runpy.run_path(str(GPU / "tables.py"))
    write(tmp_path, dry=False)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables['BEGIN']}\nold\n{tables['END']}\nafter\n")
    for _ in range(2):  # a second time changes nothing
        tables["main"](["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "Copies reach 3.01 TB/s, a large product 798 TFLOP/s." in text
    assert "| depthwise 7x7 at 56 | 2.5 | 9 | – |  |" in text
    assert "| linear attention at 56 | – | – | – | RuntimeError: out of resource |" in text
    assert "| product qkv at 56 | 1.25 | 650 |" in text
    fast, slow = text.index("128 compiled | 2,560 | 24.7%"), text.index("128 eager | 1,600 | 15.4%")
    assert fast < slow
    assert "| vit_base_patch16_224 64 compiled | – | – | – | – | – | out of time |" in text
    assert text.count("### Whole steps") == 1 and "### The loader" not in text


def test_a_dry_run_is_no_measurement(tmp_path):
    tables = runpy.run_path(str(GPU / "tables.py"))
    with pytest.raises(SystemExit, match="run the blocks first"):
        tables["page_part"](tmp_path)
    write(tmp_path, dry=True)
    with pytest.raises(SystemExit, match="dry run"):
        tables["page_part"](tmp_path)


def test_the_page_has_a_place_for_the_tables():
    tables = runpy.run_path(str(GPU / "tables.py"))
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.count(tables["BEGIN"]) == page.count(tables["END"]) == 1
