"""A scatter figure of methods: what each costs against how far it is off."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from benchmarks.quality.statistics import Interval
from diffsynth.evaluation.figures import BLUE, RED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pareto_figure(points: Mapping[str, tuple[float, Interval]], x_label: str, y_label: str) -> "Figure":
    """Draw methods as points with their intervals; those that no other method beats in both are red.

    Args:
        points: (x, y with its interval) by name; less is better on both axes.
        x_label: with its unit.
        y_label: with its unit.

    Raises:
        ValueError: there are no points.
        ImportError: matplotlib is not installed.
    """
    if not points:
        raise ValueError("points must hold at least one method")
    figure = new_figure(9, 5.6)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    front = pareto_front({name: (x, y.value) for name, (x, y) in points.items()})
    for name, (x, y) in points.items():
        bars = None if math.isnan(y.low) else [[y.value - y.low], [y.high - y.value]]
        axes.errorbar([x], [y.value], bars, fmt="o", color=RED if name in front else BLUE, label=name)
        axes.annotate(name, (x, y.value), (8, 0), textcoords="offset points", va="center", fontsize=9)
    axes.margins(x=0.15)  # for the names
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return figure


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of the points that no other point equals or beats in both numbers and beats in one."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points.values())
    }
