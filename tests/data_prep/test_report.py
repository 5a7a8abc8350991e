"""The report is one self-contained page that says what the records say."""

import html.parser
import re

import pytest
from raw_archives import encoded, jpeg, outer_tar, picture, zipped
from shard_contents import manifest

VOID = {"meta", "img", "br"}


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
        "n01443537": [encoded(picture(20), "PNG"), jpeg(21), jpeg(21)],
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
    assert not re.search(r"https?://|<script|@import|url\(", source)
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
