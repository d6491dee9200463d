"""The picture of cost against error."""

import numpy as np
import pytest

from benchmarks.quality.scatter import pareto_front, pareto_picture
from benchmarks.quality.statistics import Interval


def test_the_front_is_what_nothing_beats():
    points = {"cheap": (1, 9), "good": (5, 2), "worse": (6, 3), "same cost": (5, 4), "best": (9, 1)}
    assert pareto_front(points) == {"cheap", "good", "best"}


def test_points_on_the_front_are_red_and_others_blue():
    points = {
        "a": (10.0, Interval(value=4.0, low=3.0, high=5.0)),
        "b": (20.0, Interval(value=8.0, low=7.0, high=9.0)),
    }
    picture = np.asarray(pareto_picture(points, "FFE", "px"))
    red = np.argwhere((picture == (200, 60, 50)).all(-1))
    blue = np.argwhere((picture == (70, 110, 190)).all(-1))
    # Twice the cost lies twice as far from the left margin, twice the error twice as high.
    assert (blue[:, 1].mean() - 70) / (red[:, 1].mean() - 70) == pytest.approx(2, rel=0.02)
    assert (500 - blue[:, 0].mean()) / (500 - red[:, 0].mean()) == pytest.approx(2, rel=0.05)


def test_no_points_are_refused():
    with pytest.raises(ValueError, match="points must hold at least one method"):
        pareto_picture({}, "x", "y")
