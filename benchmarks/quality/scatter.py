"""A scatter figure of methods: what each costs against how far it is off."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from benchmarks.quality.statistics import Interval
from diffsynth.evaluation.figures import BLUE, RED, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pareto_figure(points: Mapping[str, tuple[float, Interval]], x_label: str, y_label: str) -> "Figure":
    """Draw methods as numbered points with their intervals, and a legend that names them from left to right.

    Those that no other method beats in both numbers are red and joined by a line.

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
    figure = new_figure(9, 5)
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    front = pareto_front({name: (x, y.value) for name, (x, y) in points.items()})
    ordered = sorted(points.items(), key=lambda point: (point[1][0], -point[1][1].value))
    for number, (name, (x, y)) in enumerate(ordered, start=1):
        bars = None if math.isnan(y.low) else [[y.value - y.low], [y.high - y.value]]
        colour = RED if name in front else BLUE
        axes.errorbar([x], [y.value], bars, fmt="o", elinewidth=0.8, color=colour, label=f"{number}  {name}")
        axes.annotate(str(number), (x, y.value), (5, 4), textcoords="offset points", color=colour, fontsize=9)
    best = [(x, y.value) for name, (x, y) in ordered if name in front]
    axes.step(*zip(*best, strict=True), where="post", color=RED, alpha=0.4, label="beaten by none")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names of the points that no other point equals or beats in both numbers and beats in one."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points.values())
    }
