"""The figure of cost against error."""

import math
from pathlib import Path

import pytest

from benchmarks.quality.scatter import pareto_figure, pareto_front
from benchmarks.quality.statistics import Interval
from diffsynth.evaluation.figures import BLUE, RED
from docs.make_pareto import lever_points


def test_the_front_is_what_nothing_beats():
    points = {"cheap": (1, 9), "good": (5, 2), "worse": (6, 3), "same cost": (5, 4), "best": (9, 1)}
    assert pareto_front(points) == {"cheap", "good", "best"}


def test_points_on_the_front_are_red_and_others_blue_and_a_legend_names_them():
    pytest.importorskip("matplotlib")
    points = {
        "a": (10.0, Interval(value=4.0, low=3.0, high=5.5)),
        "b": (20.0, Interval(value=8.0, low=float("nan"), high=float("nan"))),
    }
    figure = pareto_figure(points, "FFE", "px")
    (axes,) = figure.axes
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["beaten by none", "1  a", "2  b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("FFE", "px")
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    drawn = {bars.get_label()[3:]: bars.lines for bars in axes.containers}
    for name, colour in (("a", RED), ("b", BLUE)):
        marker, _caps, intervals = drawn[name]
        assert (*marker.get_xdata(), *marker.get_ydata()) == (points[name][0], points[name][1].value)
        assert marker.get_color() == colour
        assert [list(line.get_segments()[0][:, 1]) for line in intervals] == (
            [[3, 5.5]] if name == "a" else []
        )


def test_no_points_are_refused():
    with pytest.raises(ValueError, match="points must hold at least one method"):
        pareto_figure({}, "x", "y")


def test_reuse_and_guided_steps_are_read_from_the_tables_of_the_document():
    points = lever_points((Path(__file__).parents[1] / "docs" / "quality.md").read_text())
    cost, error = points["8 guided steps"]
    assert (cost, error.value) == (119, pytest.approx(11.95, abs=0.01))
    assert points["interval 5"][1].low == pytest.approx(3.83, abs=0.01)
    assert math.isnan(points["interval 1"][1].low)
    assert not any("window" in name for name in points)
