"""Charts: where points lie, round ticks, and text that cannot break out of the picture."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from svdengine.measuring.predictor_study import COMPARED_LAYERS, compared_layers
from svdengine.measuring.svg_chart import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Axes, Series, histogram, line_chart, ticks


def elements(chart: str, tag: str, kind: str = "") -> list[ET.Element]:
    found = ET.fromstring(f"<div>{chart}</div>").iter(tag)
    return [e for e in found if kind in e.get("class", "").split() or not kind]


def test_ticks_are_round_and_within() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-0.37, 0.41) == pytest.approx([-0.2, 0, 0.2, 0.4])
    for low, high in ((3.0, 1e6), (-1e-7, 2e-7), (99.0, 99.5), (0.0, 29.0)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 8 and all(low <= value <= high for value in found)


def test_corners() -> None:
    axes = Axes((0.0, 10.0), (0.0, 1.0))
    assert axes.place((0.0, 0.0)) == (LEFT, HEIGHT - BOTTOM)
    assert axes.place((10.0, 0.0)) == (WIDTH - RIGHT, HEIGHT - BOTTOM)


def test_lines() -> None:
    series = [
        Series("a < b & c", ((0, 1.0), (1, math.nan), (2, 3.0), (3, 3.5)), labels=("x<", "", "", "last")),
        Series("other", ((0, 2.0), (3, 2.0)), dashed=True),
    ]
    chart = line_chart(series, "layer", "share")
    assert len(elements(chart, "circle")) == 5
    first, second = elements(chart, "path", "line")
    assert first.get("d", "").count("M") == 2 and second.get("stroke-dasharray")
    assert "x&lt;" in chart and "a &lt; b &amp; c" in chart
    assert len(elements(chart, "li")) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        line_chart([Series("none", ((0, math.nan),))], "x", "y")


def test_one_point_and_crowded_labels() -> None:
    assert len(elements(line_chart([Series("one", ((1.0, 5.0),))], "x", "y"), "circle")) == 1
    near = Series("near", ((0.0, 0.0), (0.01, 0.0), (9.0, 0.0)), labels=("first", "second", "third"))
    chart = line_chart([near], "x", "y")
    assert all(label in chart for label in near.labels)  # every one, and none on another
    places = [(float(e.get("x", "")), float(e.get("y", ""))) for e in elements(chart, "text", "label")]
    assert len(set(places)) == len(places) and len({y for _, y in places}) > 3


def test_histogram_counts_every_value() -> None:
    chart = histogram([("no", [-1.0, -0.9, 0.1]), ("yes", [0.2, 0.8])], "score", 0.0, "from here on")
    titles = [e.findtext("title") or "" for e in elements(chart, "rect", "bar")]
    assert sum(int(title.split(": ")[1].split()[0]) for title in titles) == 5
    assert len(elements(chart, "line", "mark")) == 1 and "from here on" in chart
    assert elements(histogram([("same", [0.0, 0.0])], "score", 0.0, "here"), "rect", "bar")
    with pytest.raises(ValueError, match="nothing to draw"):
        histogram([("none", [])], "score", 0.0, "here")


def test_layers_that_are_compared_are_spread_evenly() -> None:
    assert compared_layers(1) == {0} and compared_layers(12) == set(range(12))
    for count in (13, 30, 80):
        found = sorted(compared_layers(count))
        assert len(found) == COMPARED_LAYERS and (found[0], found[-1]) == (0, count - 1)
        gaps = [b - a for a, b in pairwise(found)]
        assert max(gaps) - min(gaps) <= 1
