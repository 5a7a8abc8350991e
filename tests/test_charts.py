"""Charts: what was measured is on the page, in any number, once and the same each time."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from l2vit import charts

NAMESPACE = "{http://www.w3.org/2000/svg}"


def texts(svg, tag):
    return [element.text for element in ET.fromstring(svg).iter(NAMESPACE + tag)]


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("points", [[(1, 2.5)], [(1, 2.5), (2, 2.5)], [(1, 1e-3), (2, 10.0)]])
def test_few_and_equal_values_are_drawn(points, log_y):
    """A run of one step has curves of one value."""
    svg = charts.line_chart("loss", {"loss": points}, log_y=log_y)
    values = [float(text.rpartition(": ")[2]) for text in texts(svg, "title")]
    assert values == [y for _, y in points]
    assert "loss" in texts(svg, "text")


def test_what_cannot_be_drawn_is_left_out():
    broken = [(1, float("nan")), (2, float("inf"))]
    assert charts.line_chart("loss", {"a": broken, "b": []}) == ""
    assert charts.line_chart("loss", {"a": [(1, 0.0), (2, -1.0)]}, log_y=True) == ""
    assert charts.histogram("none", [], [0]) == charts.bar_chart("none", []) == ""
    svg = charts.line_chart("loss", {"a": [*broken, (3, 7.0)]})
    assert texts(svg, "title") == ["a, step 3: 7"]


def test_several_curves_have_a_legend_and_long_ones_stay_small():
    many = {name: [(step, step + 1.0) for step in range(20_000)] for name in ("train", "val")}
    svg = charts.line_chart("two", many)
    assert {"train", "val"} <= set(texts(svg, "text"))
    assert len(svg) < 150_000
    assert texts(svg, "title")[-1] == "val, step 19,999: 20,000"


def test_bars_name_their_values():
    svg = charts.histogram("Images", [3, 5], [0, 10, 20], x_label="images of a class")
    assert texts(svg, "title") == ["0 to 10: 3", "10 to 20: 5"]
    assert "images of a class" in texts(svg, "text")
    svg = charts.bar_chart("Formats", [("jpeg", 12_345), ("a <b> & $c$" + 40 * "x", 0)])
    assert texts(svg, "title")[0] == "jpeg: 12,345"
    assert {"jpeg", "12,345"} <= set(texts(svg, "text"))
    assert "a <b> & $c$" + 40 * "x" + ": 0" in texts(svg, "title")


def test_bars_are_as_long_as_their_values():
    """Read back from the drawing: lengths in the ratio of the values."""
    svg = ET.fromstring(charts.bar_chart("b", [("one", 1.0), ("three", 3.0)]))
    drawn = [
        group for group in svg.iter(NAMESPACE + "g") if group.find(NAMESPACE + "title") is not None
    ]
    lengths = []
    for group in drawn:
        numbers = re.findall(r"[ML] ([\d.]+)", group.find(NAMESPACE + "path").get("d"))
        lengths.append(max(map(float, numbers)) - min(map(float, numbers)))
    assert lengths[1] / lengths[0] == pytest.approx(3, rel=1e-4)


def test_two_charts_of_a_page_share_no_id():
    page = [
        charts.line_chart("a", {"x": [(1, 1.0), (2, 2.0)]}),
        charts.line_chart("b", {"x": [(1, 1.0), (2, 2.0)]}),
        charts.histogram("c", [1, 2], [0, 1, 2]),
    ]
    ids = [name for svg in page for name in re.findall(r' id="([^"]+)"', svg)]
    assert ids and len(ids) == len(set(ids))
    for svg in page:
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert used == set(re.findall(r' id="([^"]+)"', svg))


def test_equal_data_gives_equal_text_in_another_process():
    code = "from l2vit import charts; print(charts.line_chart('t', {'a': [(1, 2.0), (3, 4.0)]}))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = charts.line_chart("t", {"a": [(1, 2.0), (3, 4.0)]})
    assert there.stdout.strip() == here
    assert "date" not in here.lower()


def test_the_page_decides_the_colours():
    svg = charts.line_chart("t", {"a": [(1, 2.0), (3, 4.0)]})
    assert all(
        "fill: currentColor" in e.get("style") for e in ET.fromstring(svg).iter(NAMESPACE + "text")
    )
    assert not re.search(r"#(000000|ffffff)\b", svg), "black or white would vanish on some page"
    assert "<style" not in svg, "CSS inside would apply to the whole page"


def test_importing_charts_imports_no_matplotlib():
    code = "import sys, l2vit.charts; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
