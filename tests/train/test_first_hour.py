"""The benchmark of the first hour runs, every step of it once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import first_hour

ROOT = Path(__file__).parents[2]


def test_the_folder_it_draws(tmp_path):
    size = first_hour.Size(classes=3, train=2, val=1)
    first_hour.make_images(tmp_path, size)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jpg"))
    assert found[:2] == ["train/class000/000.jpg", "train/class000/001.jpg"]
    assert len(found) == 9 and found[-1] == "val/class002/000.jpg"


@pytest.mark.ci
def test_tiny_run(tmp_path):
    command = [sys.executable, "benchmarks/first_hour.py", "--tiny", "--only", "accuracy"]
    command += ["--json", str(tmp_path / "found.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [run["side"] for run in found["runs"]] == ["ours", "timm advised"]
    assert set(found["means"]) == {"ours", "timm advised"}
