"""Bootstrap confidence intervals over clusters: the runs of one pair are drawn together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value and the bounds of its confidence interval, which are nan if there is only one cluster."""

    value: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable], level: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of values and its percentile bootstrap interval.

    clusters: for each value the name of what is drawn as one, such as the pair that a run is of.
    Raises ValueError for lengths that differ, no values, values that are not finite, and a level that is not
    between 0 and 1.
    """
    return ratio_interval(values, np.ones(len(values)), clusters, level, seed)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[Hashable],
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The ratio of the means of two paired samples and its percentile bootstrap interval.

    The same clusters are drawn for both, so that what they share cancels. Raises ValueError as
    `mean_interval`, and if the denominators sum to 0.
    """
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    if not len(top) == len(bottom) == len(clusters) or not len(top):
        raise ValueError(
            f"values and clusters must be as many, and some; got {len(top)}, {len(bottom)}, {len(clusters)}"
        )
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise ValueError("values must be finite")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1; got {level!r}")
    if bottom.sum() == 0:
        raise ValueError("the denominators sum to 0: there is no ratio")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    index = [numbers[name] for name in clusters]
    sums = np.stack([np.bincount(index, weights=part) for part in (top, bottom)])
    value = float(top.sum() / bottom.sum())
    if len(numbers) == 1:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    tops, bottoms = sums[:, drawn].sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.quantile(tops / bottoms, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high))
