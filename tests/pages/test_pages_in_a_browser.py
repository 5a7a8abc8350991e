"""Every page in a real browser: on a telephone and on a desk, in light and dark colours."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("websocket")
import chromium

from data_prep import __main__ as data_prep
from data_prep.report import write_report
from l2vit import config, files
from l2vit.train import report, runs
from l2vit.train.config import TrainConfig
from l2vit.train.run_record import RunRecord
from pretrain import preview_page as preview

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(chromium.PROGRAM is None, reason="chromium is not installed"),
]
HOSTILE = "<img src=x onerror=alert(1)>" + 120 * "w"


@pytest.fixture(scope="session")
def tab(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A few pictures, one of them damaged, as a build leaves them."""
    folder = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    for number in range(24):
        where = folder / "raw" / f"class {number % 2} {'x' * 60}"
        where.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (40, 52, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{number}.png")
    (where / "broken.png").write_bytes(b"no picture")
    given = ["--dataset", "folder", "--source", str(folder / "raw"), "--out", str(folder / "out")]
    assert data_prep.main(["build", *given, "--workers", "1"]) == 0
    return folder / "out" / "train"


def run(directory):
    """A run with everything its page can tell, long and hostile names among it."""
    directory.mkdir()
    common = {"memory_gib": 1.5, "mfu_percent": 20.0, "phase_percent/data": 1.0}
    records = [
        {"step": s, "images": 32 * s, "time": 1e9 + s, "loss": 9.0 / s, "skipped_steps": s // 20}
        | common
        for s in range(1, 60)
    ]
    sets = {"val/top1_percent": 61.0, "val_ema/top1_percent": 62.5, "val/loss": 1.0}
    records.append({"step": 60, "images": 1920, "time": 1e9 + 60, **sets})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    start = {"event": "start", "time": 1e9, "step": 0, "reached": 7, "weights": HOSTILE}
    start |= {"command": ["launch/pretrain.sh", HOSTILE], "steps_per_epoch": 20, "ranks": 2}
    failed = {"event": "failed", "time": 1e9 + 30, "step": 30, "why": HOSTILE}
    (directory / "history.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(failed)}\n")
    (directory / "plan.json").write_text('{"device": "h100", "ranks": 8, "steps": 60}')
    return RunRecord.load(directory)


@pytest.fixture(scope="session")
def written(tmp_path_factory, shards):
    """Each page as a file, by name."""
    folder = tmp_path_factory.mktemp("pages")
    one, other = run(folder / "one"), run(folder / f"other{'-long' * 30}")
    settings = config.from_tree(
        TrainConfig,
        {
            "run": {"dir": "unused"},
            "model": {"name": "l2vit_mini"},
            "schedule": {"global_batch": 4},
            "data": {"train": str(shards), "input_size": 32},
        },
    )
    texts = {
        "report": report.page(one),
        "empty": report.page(RunRecord(HOSTILE)),
        "runs": runs.page([one, other]),
        "preview": preview.page(settings, images=4, images_seen=0),
    }
    for name, text in texts.items():
        files.write_text(folder / f"{name}.html", text)
    write_report(shards, folder / "shards.html")
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["report", "empty", "runs", "preview", "shards"])
def test_nothing_overflows_and_no_error_appears(name, width, dark, tab, written):
    tab.open(written[name], width=width, dark=dark)
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert tab.errors() == []
    assert tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    background, ink = tab.evaluate(
        "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
    )
    light = [sum(map(int, colour[4:-1].split(","))) > 382 for colour in (background, ink)]
    assert light == [not dark, dark]


def test_the_values_under_the_pointer_are_shown(tab, written):
    tab.open(written["report"], width=390, dark=False)
    svg = "document.querySelector('svg[aria-label^=\"training loss\"]')"
    place = f"(r => [r.left, r.right, r.top])({svg}.getBoundingClientRect())"
    tab.evaluate(f"{svg}.scrollIntoView({{block: 'center'}})")
    _, right, top = tab.evaluate(place)
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=right - 3, y=top + 60)
    tip = tab.evaluate(f"{svg}.closest('figure').querySelector('.tip').innerText")
    assert tip.split("\n") == ["step 59, epoch 2.95", f"loss {9 / 59:.6f}".rstrip("0")]
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


def test_a_key_hides_its_curve(tab, written):
    tab.open(written["runs"], width=1280, dark=False)
    tab.evaluate("document.querySelector('.keys button').click()")
    shown = "[...document.querySelector('figure.chart').querySelectorAll('svg [data-series]')]"
    states = tab.evaluate(f"{shown}.map(e => [e.dataset.series, getComputedStyle(e).visibility])")
    assert {tuple(state) for state in states} >= {("0", "hidden"), ("1", "visible")}
