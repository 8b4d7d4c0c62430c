import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.report.charts import (
    Series,
    Spread,
    bar_chart,
    line_chart,
    meter,
    number,
    smoothed,
    spread_chart,
    tag,
)
from tests.report.parsed_page import Page

ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(ANY, ANY), max_size=20), st.sampled_from(["line", "dots", "mark"]))
def test_any_points_make_a_chart_inside_its_frame(points, form):
    markup = line_chart("t", [Series("a", points, form), Series("b", points)], x_label="x")
    Page(markup)
    assert not re.search(r"\b(nan|inf)\b", markup)
    for pair in re.findall(r'points="([^"]*)"', markup):
        for x, y in (map(float, point.split(",")) for point in pair.split()):
            assert 0 <= x <= 440 and 0 <= y <= 230


def test_a_chart_keeps_the_ends_of_a_long_series():
    points = [(float(step), float(step)) for step in range(10_000)]
    drawn = re.search(r'points="([^"]*)"', line_chart("t", [Series("a", points)], x_label="x"))[1]
    first, *_, last = drawn.split()
    assert first.startswith("54.0,") and last.split(",")[0] == "424.0"
    assert len(drawn.split()) == 300


def test_smoothing_is_a_mean_of_neighbours():
    values = [3.0, 0.0, 6.0, math.nan, 9.0]
    points = list(enumerate(values))
    assert smoothed(points) == [(0, 1.5), (1, 3.0), (2, 5.0), (4, 7.5)]


def test_bars_are_as_high_as_their_values():
    markup = bar_chart("t", [("a", 1.0), ("b", 2.0), ("c", 0.0)], x_label="x")
    low, high, none = (float(found) for found in re.findall(r' height="([\d.]+)"', markup))
    assert high == pytest.approx(2 * low, abs=0.1) and none == 0
    assert "no data" in bar_chart("t", [("a", 0.0)], x_label="x")


def test_a_spread_is_cut_into_quarters():
    values = [float(value) for value in range(100, -1, -1)]
    found = Spread.of("a", values, series=1)
    assert found == Spread("a", 1, low=10, first=25, median=50, third=75, high=90)
    assert Spread.of("a", [2.0], series=0) == Spread("a", 0, *[2.0] * 5)


FINITE = st.floats(min_value=0, max_value=1e9)
SPREADS = st.lists(st.tuples(st.sampled_from("ab"), st.lists(FINITE, min_size=1)), max_size=6)


@given(SPREADS)
def test_any_spreads_make_a_chart_inside_its_frame(made):
    spreads = [Spread.of(name, values, series=i % 2) for i, (name, values) in enumerate(made)]
    markup = spread_chart("t", spreads, names=["early", "late"], x_label="x", note="says <this>")
    Page(markup)
    assert "says &lt;this&gt;" in markup and ("no data" in markup) == (not made)
    for x, width in re.findall(r'<rect x="([\d.]+)"[^>]*? width="([\d.]+)"', markup):
        assert float(x) >= 130 and float(x) + float(width) <= 440


@given(ANY)
def test_a_meter_is_never_wider_than_its_frame(share):
    width = float(re.search(r"width:([\d.]+)%", meter(share, label="l"))[1])
    assert 0 <= width <= 100


def test_markup_is_escaped_once():
    inner = tag("b", "<&>", title='"')
    assert tag("p", inner, "'") == '<p><b title="&quot;">&lt;&amp;&gt;</b>&#x27;</p>'


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,234"), (None, "–"), (math.nan, "–"), (math.inf, "–"), (True, "–"), ("1", "–")],
)
def test_numbers(value, shown):
    assert number(value) == shown
