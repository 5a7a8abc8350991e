"""Charts: what was measured is on the page, in any number, once and the same each time."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from l2vit import charts

NAMESPACE = "{http://www.w3.org/2000/svg}"


def texts(figure, tag):
    return [element.text for element in ET.fromstring(figure).iter(NAMESPACE + tag)]


def carried(figure):
    """The points that the page's script shows, by curve."""
    data = json.loads(ET.fromstring(figure).find("script").text)
    return {s["name"]: [tuple(p) for p in s["points"]] for s in data["series"]}, data


def drawn(figure):
    """The corners of each curve, in the picture's own units."""
    paths = [path.get("d") for path in ET.fromstring(figure).iter(NAMESPACE + "path")]
    return [[tuple(map(float, p.split(","))) for p in d[1:].split("L")] for d in paths]


@pytest.mark.parametrize("points", [[(1, 2.5)], [(1, 2.5), (2, 2.5)], [(1, 1e-3), (2, 10.0)]])
def test_few_and_equal_values_are_drawn(points):
    """A run of one step has curves of one value."""
    figure = charts.line_chart("loss", {"loss": points})
    assert carried(figure)[0] == {"loss": points}
    marks = [*drawn(figure), *ET.fromstring(figure).iter(NAMESPACE + "circle")]
    assert len(marks) == 1 and "nan" not in figure


def test_what_cannot_be_drawn_is_left_out():
    broken = [(1, float("nan")), (2, float("inf"))]
    assert charts.line_chart("loss", {"a": broken, "b": []}) == ""
    assert charts.histogram("none", [], [0]) == charts.bar_chart("none", []) == ""
    assert carried(charts.line_chart("loss", {"a": [*broken, (3, 7.0)]}))[0] == {"a": [(3, 7.0)]}


def test_a_curve_lies_where_its_values_are():
    """The picture is a linear map of the data: fitted here from the corners, downward in y."""
    points = [(step, 4.0 / step) for step in range(1, 20)]
    (corners,) = drawn(charts.line_chart("loss", {"loss": points}))
    for axis, sign in ((0, 1), (1, -1)):
        values, places = (np.array([p[axis] for p in of]) for of in (points, corners))
        slope, shift = np.polyfit(values, places, 1)
        assert slope * sign > 0
        assert np.abs(values * slope + shift - places).max() < 0.06


def test_the_script_is_told_where_the_axes_are():
    points = [(100, 1.0), (500, 3.0)]
    figure = charts.line_chart("a", {"x": points}, per_epoch=50)
    (corners,) = drawn(figure)
    data = carried(figure)[1]
    left, _, width, _ = data["box"]
    assert corners[0][0] == pytest.approx(left, abs=0.06)
    assert corners[1][0] == pytest.approx(left + width, abs=0.06)
    assert data["range"] == [100, 500] and {"step", "epoch"} <= set(texts(figure, "text"))


def test_several_curves_have_a_legend_and_long_ones_stay_small():
    many = {name: [(step, step + 1.0) for step in range(20_000)] for name in ("train", "val")}
    figure = charts.line_chart("two", many)
    keys = [button.get("data-series") for button in ET.fromstring(figure).iter("button")]
    assert keys == ["0", "1"] and ">train</button>" in figure
    assert len(figure) < 60_000
    assert carried(figure)[0]["val"][-1] == (19_999, 20_000)


def test_smoothing_is_an_average_without_a_bias():
    level = [(step, 3.0) for step in range(200)]
    assert np.allclose(charts.smoothed(level), level)
    noise = [(s, 3.0 + math.sin(7 * s)) for s in range(600)]
    assert max(abs(y - 3.0) for _, y in charts.smoothed(noise)[100:]) < 0.15
    figure = charts.line_chart("loss", {"loss": noise}, smooth=True)
    raw, averaged = drawn(figure)
    assert len(raw) == len(averaged)
    assert carried(figure)[0]["loss"][0] == noise[0], "the values shown are the measured ones"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 311_940), (0.0, 1e-3), (-3, 7), (0.1, 0.11)])
def test_ticks_are_round_and_inside(low, high):
    found = charts.ticks(low, high, 6)
    assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])
    digit = float(f"{steps[0]:.3e}".split("e")[0])
    assert digit in (1.0, 2.0, 5.0)


def test_bars_name_their_values():
    figure = charts.histogram("Images", [3, 5], [0, 10, 20], x_label="images of a class")
    assert texts(figure, "title") == ["0 to 10: 3", "10 to 20: 5"]
    assert "images of a class" in texts(figure, "text")
    figure = charts.bar_chart("Formats", [("jpeg", 12_345), ("a <b> & $c$" + 40 * "x", 0)])
    assert texts(figure, "title")[0] == "jpeg: 12,345"
    assert {"jpeg", "12,345"} <= set(texts(figure, "text"))
    assert "a <b> & $c$" + 40 * "x" + ": 0" in texts(figure, "title")


def test_bars_are_as_long_as_their_values():
    """Read back from the drawing: lengths in the ratio of the values."""
    figure = ET.fromstring(charts.bar_chart("b", [("one", 1.0), ("three", 3.0)]))
    one, three = (float(bar.get("width")) for bar in figure.iter(NAMESPACE + "rect"))
    assert three / one == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("name", ["</script><b>", "<!-- & -->", "\u2028"])
def test_names_cannot_end_the_script_or_the_figure(name):
    figure = charts.line_chart(name, {name: [(1, 1.0), (2, 2.0)], "b": [(1, 1.0)]})
    assert set(carried(figure)[0]) == {name, "b"}
    assert figure.count("</script>") == 1 and "<b>" not in figure


def test_equal_data_gives_equal_text_in_another_process():
    code = "from l2vit import charts; print(charts.line_chart('t', {'a': [(1, 2.0), (3, 4.0)]}))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == charts.line_chart("t", {"a": [(1, 2.0), (3, 4.0)]})
