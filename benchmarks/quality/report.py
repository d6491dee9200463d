"""From rows of an evaluation to a table: means with 95 % intervals, and what differs from a baseline."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.quality.pairs import Row
from benchmarks.quality.scatter import pareto_figure
from benchmarks.quality.statistics import Interval, mean_interval, ratio_interval
from diffsynth.configs.descriptors import NO_TRANSFER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name in a Row -> (heading, digits).
COLUMNS = {
    "trajectory_error": ("path error px", 2),
    "relative_trajectory_error": ("path error / length", 3),
    "displacement_error": ("form error px", 2),
    "velocity_cosine": ("velocity cosine", 2),
    "flow_error": ("flow error px", 2),
    "colour_right": ("colour right", 2),
    "background_right": ("background right", 2),
    "shape_right": ("shape right", 2),
    "found": ("object found", 2),
    "object_consistency": ("object steady", 3),
    "background_consistency": ("background steady", 3),
    "seconds": ("seconds", 2),
    "gradient_evaluations": ("gradients", 0),
    "forward_equivalents": ("FFE", 0),
}
RATIOS = ("trajectory_error", "relative_trajectory_error", "displacement_error", "flow_error", "seconds")
DIFFERENCES = ("velocity_cosine", "colour_right", "background_right", "shape_right")


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSummary:
    """The numbers of a method's runs.

    Attributes:
        runs: how many there are.
        errors: how many of them failed, by error.
        means: intervals by the name of the metric.
        ratios: to the baseline, over the runs of the same pairs and seeds, by the name of the metric.
        differences: to the baseline, likewise.
    """

    runs: int
    errors: dict[str, int] = field(default_factory=dict)
    means: dict[str, Interval] = field(default_factory=dict)
    ratios: dict[str, Interval] = field(default_factory=dict)
    differences: dict[str, Interval] = field(default_factory=dict)


def summarise(rows: Sequence[Row], baseline: str = NO_TRANSFER) -> dict[str, MethodSummary]:
    """Summarise each method, in the order in which methods first appear.

    Intervals are bootstrapped over pairs, so that several seeds of one pair do not count as independent.

    Args:
        rows: of all methods.
        baseline: the method that ratios and differences are to; without its rows there are none.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to summarise")
    base = {(row.split, row.pair, row.seed): row for row in rows if row.method == baseline}
    return {
        method: _summary([row for row in rows if row.method == method], base)
        for method in dict.fromkeys(row.method for row in rows)
    }


def _summary(rows: list[Row], base: dict[tuple[str, int, int], Row]) -> MethodSummary:
    errors: dict[str, int] = {}
    for row in rows:
        if row.error is not None:
            errors[row.error] = errors.get(row.error, 0) + 1
    summary = MethodSummary(runs=len(rows), errors=errors)
    for name in COLUMNS:
        there = [row for row in rows if getattr(row, name) is not None]
        if not there:
            continue
        summary.means[name] = mean_interval([getattr(row, name) for row in there], _clusters(there))
        both = [
            (row, other)
            for row in there
            if (other := base.get((row.split, row.pair, row.seed))) is not None
            and getattr(other, name) is not None
        ]
        if not both:
            continue
        own, others = ([getattr(row, name) for row in side] for side in zip(*both, strict=True))
        clusters = _clusters([row for row, _ in both])
        if name in RATIOS and sum(others) > 0:
            summary.ratios[name] = ratio_interval(own, others, clusters)
        if name in DIFFERENCES:
            gaps = [a - b for a, b in zip(own, others, strict=True)]
            summary.differences[name] = mean_interval(gaps, clusters)
    return summary


def _clusters(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return [(row.split, row.pair) for row in rows]


def best_method(summaries: dict[str, MethodSummary], names: Sequence[str]) -> str | None:
    """Return which of some methods has the least path error; None if none of them has runs."""
    errors = {
        name: summaries[name].means["trajectory_error"].value
        for name in names
        if name in summaries and "trajectory_error" in summaries[name].means
    }
    return min(errors, key=errors.__getitem__) if errors else None


def markdown_table(
    summaries: dict[str, MethodSummary], baseline: str = NO_TRANSFER, columns: Sequence[str] = tuple(COLUMNS)
) -> str:
    """Return a Markdown table with a row for each method, mean [low, high], and the failed runs below it.

    Args:
        summaries: of the methods, by name.
        baseline: the method that the ratio of path errors is to.
        columns: of COLUMNS; those without a number are left out.
    """
    shown = [name for name in columns if any(name in summary.means for summary in summaries.values())]
    headings = ["method", "runs", f"path error / {baseline}", *(COLUMNS[name][0] for name in shown)]
    lines = [f"| {' | '.join(headings)} |", f"|---|--:|{'---|' * (len(headings) - 2)}"]
    for method, summary in summaries.items():
        cells = [method, str(summary.runs), _cell(summary.ratios.get("trajectory_error"), 2)]
        cells += [_cell(summary.means.get(name), COLUMNS[name][1]) for name in shown]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [
        f"- {method}: {count} failed: {error}"
        for method, summary in summaries.items()
        for error, count in summary.errors.items()
    ]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


def _cell(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return ""
    value, low, high = (f"{number:.{digits}f}" for number in (interval.value, interval.low, interval.high))
    return value if math.isnan(interval.low) or low == high else f"{value} [{low}, {high}]"


def cost_figure(summaries: dict[str, MethodSummary]) -> "Figure | None":
    """Draw path error against FFE, a point for each method; None if no method has both numbers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    points = {
        name: (summary.means["forward_equivalents"].value, summary.means["trajectory_error"])
        for name, summary in summaries.items()
        if {"forward_equivalents", "trajectory_error"} <= summary.means.keys()
    }
    labels = "denoising with its guidance, in full forwards of the DiT", "path error, px"
    return pareto_figure(points, *labels) if points else None


def as_json(summaries: dict[str, MethodSummary]) -> dict[str, dict]:
    """Return summaries as plain dicts for JSON; bounds that do not exist are None."""
    return {
        method: {
            "runs": summary.runs,
            "errors": summary.errors,
            **{
                kind: {name: _bounds(interval) for name, interval in getattr(summary, kind).items()}
                for kind in ("means", "ratios", "differences")
            },
        }
        for method, summary in summaries.items()
    }


def _bounds(interval: Interval) -> dict[str, float | None]:
    bounds = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: None if math.isnan(number) else number for name, number in bounds.items()}
