"""Runs side by side: what their files say, whatever state they are in."""

import json
import re

import pytest

from l2vit.train import runs
from pretrain.runs import main


@pytest.fixture
def directory(tmp_path):
    def run(name, records, length=None, done=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        if length:
            (folder / "config.yaml").write_text(f"schedule: {{length: {length}}}\n")
        if done:
            (folder / "DONE").write_text(done)

    loss = [{"step": s, "time": 100.0 + s, "images": s, "loss": 4.0 / s} for s in range(1, 9)]
    measured = {"step": 8, "time": 108.0, "images": 8, "val/top1_percent": 50.0}
    measured |= {"val_ema/top1_percent": 61.5, "images_per_second": 1234.5}
    complete = '{"length": ["8 steps", "0 epochs"]}'
    run("tiny", [*loss, measured], "8 steps", complete)
    run(
        "deep/longer",
        [*loss, {"step": 8, "time": 108, "seconds_left": 3700.0}],
        "9 steps",
        complete,
    )
    run("begun", [], "8 steps", '{"len')
    return tmp_path


def test_the_table(directory):
    lines = runs.table(runs.find(directory), now=168.0).splitlines()
    assert lines[0].split()[:3] == ["run", "state", "step"]
    begun, longer, tiny = (line.split("  ") for line in lines[1:])
    cells = [[cell.strip() for cell in row if cell.strip()] for row in (begun, longer, tiny)]
    assert cells[0] == ["begun", "not finished", "0", "-", "-", "-", "-", "-"]
    assert cells[1][:5] == ["deep/longer", "not finished", "8", "01:01:40", "00:01:00 ago"]
    assert cells[2] == [
        *("tiny", "finished", "8", "-", "00:01:00 ago"),
        *("0.5000", "val 50.00%, val_ema 61.50%", "1,234.5"),
    ]


def test_values_and_the_page(directory, capsys):
    page = directory / "runs.html"
    assert main([str(directory), "--json", "--page", str(page)]) == 0
    begun, _, tiny = json.loads(capsys.readouterr().out)
    assert tiny["top1_percent"] == {"val": 50.0, "val_ema": 61.5}
    assert begun["loss"] is None
    text = page.read_text()
    assert text.count("<svg") == 3, "loss, speed and the accuracies"
    data = re.findall(r'<script type="application/json">(.*?)</script>', text)
    loss = next(c for c in map(json.loads, data) if len(c["series"][0]["points"]) == 8)
    assert [s["name"] for s in loss["series"]] == ["deep/longer", "tiny"]
    assert all(s["points"][-1] == [8, 0.5] for s in loss["series"])


def test_one_run_and_none(directory, tmp_path, capsys):
    assert main([str(directory / "tiny")]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("tiny  finished")
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 1
    assert "no runs in" in capsys.readouterr().err
