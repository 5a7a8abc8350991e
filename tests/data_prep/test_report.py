"""The report is one self-contained page that says what the records say."""

import html.parser
import json
import re

import numpy as np
import pytest
from raw_archives import encoded, jpeg, outer_tar, picture, zipped
from shard_contents import manifest

VOID = {"meta", "img", "br"}
PNG = encoded(picture(22), "PNG")


class Page(html.parser.HTMLParser):
    """Checks nesting, collects what the page would load, and its text."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    from data_prep.__main__ import main

    root = tmp_path_factory.mktemp("report")
    classes = {
        "n01440764": [jpeg(i) for i in range(6)] + [zipped(jpeg(10)), jpeg(11)[:900]],
        "n01443537": [encoded(picture(20), "PNG"), jpeg(21), jpeg(21), zipped(PNG)],
        "n9<script>": [jpeg(30)],
    }
    (root / "raw.tar").write_bytes(outer_tar(classes))
    words = ["build", "--dataset", "imagenet22k", "--source", str(root / "raw.tar")]
    assert main([*words, "--out", str(root / "out"), "--workers", "1"]) == 0
    return root / "out"


def test_the_page_is_whole_self_contained_and_true(built, run):
    assert run("report", built) == 0
    source = (built / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert page.open == []
    assert page.loads and all(link.startswith("data:image/jpeg;base64,") for link in page.loads)
    # of addresses only the names of SVG's own name spaces
    assert not re.search(r"https?://(?!www\.w3\.org/)|<script|@import|url\((?!#)", source)
    text = " ".join(page.text)
    for word in ("3 of 3", "tench (n01440764)", "truncated", "gzip"):
        assert word in text
    about = manifest(built)
    assert about["hash"] in text and about["class_hash"] in text
    assert "n9<script>" in text  # shown as text, not run


def test_it_works_without_the_build_directory(built, tmp_path, run):
    import shutil

    alone = tmp_path / "alone"
    shutil.copytree(built, alone, ignore=shutil.ignore_patterns(".build"))
    assert run("report", alone, "--out", tmp_path / "page.html") == 0
    assert "build directory is gone" in (tmp_path / "page.html").read_text()


def test_no_shards_no_report(tmp_path, run, capsys):
    assert run("report", tmp_path) == 1
    assert "manifest.json" in capsys.readouterr().err


def text_of(path):
    page = Page()
    page.feed(path.read_text())
    return re.sub(r"\s+", " ", " ".join(page.text))


def test_combined_repairs_are_one_row(built, run):
    assert run("report", built) == 0
    text = text_of(built / "report.html")
    assert "several at once: 1" in text and "png: 1" in text and "gzip: 1" in text
    assert "Combined: gzip+png 1" in text and "gzip+png:" not in text


def test_the_heading_names_what_the_data_is(built, tmp_path, run):
    """These are no classes of ImageNet-22k, whatever --dataset said of the source's form."""
    assert run("report", built) == 0
    source = (built / "report.html").read_text()
    assert "<h1>raw.tar, train part</h1>" in source and "imagenet22k" not in source.split("<h2>")[0]
    about = manifest(built)
    about["provenance"]["release"] = "winter21"
    from l2vit.data.manifest import Manifest

    Manifest._parse(about, built).save(built)
    assert run("report", built, "--out", tmp_path / "page.html") == 0
    assert "imagenet22k, winter21, train part" in (tmp_path / "page.html").read_text()


def test_one_huge_picture_does_not_flatten_the_charts(tmp_path, run):
    rng = np.random.default_rng(0)
    sizes = [(int(w), int(w * r)) for w, r in rng.uniform((60, 0.7), (120, 1.4), (60, 2))]
    images = [jpeg(n, *size) for n, size in enumerate(sizes)] + [jpeg(99, 3000, 2000)]
    (tmp_path / "raw.tar").write_bytes(outer_tar({"n92000000": images}))
    words = ("build", "--dataset", "imagenet22k", "--source", tmp_path / "raw.tar")
    assert run(*words, "--out", tmp_path / "out", "--workers", 1) == 0
    assert run("report", tmp_path / "out") == 0
    text = text_of(tmp_path / "out/report.html")
    assert "Not in the chart: 1 above, up to 2,000." in text
    source = (tmp_path / "out/report.html").read_text()
    chart = next(c for c in source.split("<svg")[1:] if 'aria-label="Short side"' in c)
    filled = [int(n) for n in re.findall(r"[\d.]+ to [\d.]+: (\d+)", chart.split("</svg>")[0])]
    assert sum(filled) == 60 and sum(count > 0 for count in filled) > 8


def test_the_values_shown_and_those_beyond_are_all_values():
    from data_prep.report import _fences

    rng = np.random.default_rng(1)
    for values in (rng.normal(size=500), np.full(50, 7.0), np.array([5.0] * 99 + [900.0])):
        low, high = _fences(values)
        assert values.min() <= low <= np.median(values) <= high <= values.max()
    assert _fences(np.array([100.0] * 999 + [1e9]))[1] == 100


def test_largest_and_smallest_classes_do_not_overlap(tmp_path, run):
    def shown(count):
        classes = {
            f"n93{n:06d}": [jpeg(50 * n + i) for i in range(1 + n % 3)] for n in range(count)
        }
        (tmp_path / f"{count}.tar").write_bytes(outer_tar(classes))
        words = ("build", "--dataset", "imagenet22k", "--source", tmp_path / f"{count}.tar")
        out = tmp_path / f"out{count}"
        assert run(*words, "--out", out, "--workers", 1) == 0 and run("report", out) == 0
        text = text_of(out / "report.html").split("The images")[0]
        return text, re.findall(r"(n93\d{6}): \d", text)

    text, names = shown(16)
    assert "All classes" in text and len(names) == len(set(names)) == 16
    text, names = shown(17)
    assert "Largest" in text and "Smallest" in text and len(names) == len(set(names)) == 16


def test_counts_of_the_source_are_of_this_part(tmp_path, run):
    for part, form, count in (("train", "JPEG", 9), ("val", "PNG", 4)):
        for number in range(count):
            path = tmp_path / "raw" / part / "cat" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(100 * count + number), form))
    (tmp_path / "raw/val/cat/bad.jpg").write_bytes(b"words")
    words = ("build", "--dataset", "folder", "--source", tmp_path / "raw", "--out", tmp_path / "o")
    assert run(*words, "--workers", 1) == 0
    for part, form, good, seen in (("train", "jpeg", 9, 9), ("val", "png", 4, 5)):
        assert run("report", tmp_path / "o" / part) == 0
        text = text_of(tmp_path / "o" / part / "report.html")
        assert f"members looked at for this part {seen}" in text
        assert json.dumps(manifest(tmp_path / "o" / part)["provenance"]["source_formats"]) == (
            json.dumps({form: good})
        )
        assert ("png: 4" in text) == (part == "val")
