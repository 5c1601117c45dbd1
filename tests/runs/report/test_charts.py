import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from qnas.runs.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Band,
    Level,
    Series,
    chart,
    log_ticks,
    nice_ticks,
    thin,
)


def svg(figure: str) -> ElementTree.Element:
    found = re.search(r"<svg.*</svg>", figure)
    assert found is not None
    return ElementTree.fromstring(found.group())


def draw(series: list[Series], **options: object) -> str:
    return str(chart(series, title="t", x_label="x", y_label="y", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.0271, 0.0273), (-3.7, 12.0), (1.0, 1.0), (90.0, 4000.0)]
)
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    assert 1 <= len(ticks) <= 11
    for a, b in pairwise(ticks):
        mantissa = (b - a) / 10 ** math.floor(math.log10(b - a) + 1e-9)
        assert min(abs(mantissa - round_) for round_ in (1, 2, 5)) < 1e-6


def test_logarithmic_ticks_are_round_and_within() -> None:
    assert log_ticks(0.3, 30) == [0.5, 1, 2, 5, 10, 20]
    assert log_ticks(0.51, 0.52) == [0.51, 0.52]


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_where_the_grid_says(log: bool) -> None:
    points = [(1.0, 0.1), (2.0, 0.5), (5.0, 0.2), (10.0, 0.9)]
    drawing = svg(draw([Series("s", points, mark="dots")], log_x=log))
    ticks = [text for text in drawing.iter("text") if "tick" in (text.get("class") or "")]
    at_x = {float(t.text or ""): float(t.get("x") or 0) for t in ticks if t.get("class") == "tick"}
    at_y = {float(t.text or ""): float(t.get("y") or 0) - 3.5 for t in ticks if t.get("class") == "tick y"}
    circles = [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in drawing.iter("circle")]
    assert len(circles) == 4
    # they fill the plot
    assert LEFT <= circles[0][0] <= LEFT + 20
    assert WIDTH - RIGHT - 20 <= circles[-1][0] <= WIDTH - RIGHT
    assert all(TOP <= y <= HEIGHT - BOTTOM for _, y in circles)
    (x0, p0), *_, (x1, p1) = sorted(at_x.items())
    (y0, q0), *_, (y1, q1) = sorted(at_y.items())
    scale = math.log if log else float
    for (x, y), (a, b) in zip(points, circles, strict=True):
        share = (scale(x) - scale(x0)) / (scale(x1) - scale(x0))
        assert a == pytest.approx(p0 + share * (p1 - p0), abs=0.3)
        assert b == pytest.approx(q0 + (y - y0) / (y1 - y0) * (q1 - q0), abs=0.3)


def test_everything_drawn_is_named_in_the_legend() -> None:
    figure = draw(
        [Series("one", [(0, 0), (1, 1)]), Series("two", [(0, 1)], 2, "star"), Series("none", [])],
        levels=[Level(0.5, "half")],
        bands=[Band(0.2, 0.4, "strip")],
    )
    assert re.findall(r"</i>([^<]*)</li>", figure) == ["one", "two", "half", "strip"]
    assert draw([Series("none", [])]) == ""


def test_names_and_titles_are_escaped() -> None:
    bad = '<script>"&'
    figure = draw([Series(bad, [(0, 0)], mark="dots", titles=[bad])])
    assert "<script" not in figure
    (title,) = svg(figure).iter("title")
    assert title.text == bad


def test_close_percentages_are_told_apart() -> None:
    drawing = svg(draw([Series("s", [(0, 0.80), (1, 0.82)])], percent=True))
    texts = [t.text for t in drawing.iter("text") if t.get("class") == "tick y"]
    assert len(texts) == len(set(texts)) > 2


def test_thinning_keeps_the_ends_sums() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert thinned[-1] == points[-1]
    assert thinned[0] == (4.5, sum(i % 7 for i in range(10)) / 10)
    assert thin(points[:50], 100) == points[:50]
