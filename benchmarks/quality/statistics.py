"""Bootstrap confidence intervals over clusters: the runs of one pair are drawn together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value and its confidence interval.

    Attributes:
        value: the estimate.
        low: lower bound; nan if there is only one cluster.
        high: upper bound; nan if there is only one cluster.
    """

    value: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable], level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the mean of values and its percentile bootstrap interval.

    Args:
        values: the sample.
        clusters: for each value the name of the cluster it is drawn with, such as the pair that a run is of.
        level: of confidence, between 0 and 1.
        seed: of the bootstrap.

    Raises:
        ValueError: lengths differ, there are no values, some are not finite, or the level is out of range.
    """
    return ratio_interval(values, np.ones(len(values)), clusters, level, seed)


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[Hashable],
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the ratio of the means of two paired samples and its percentile bootstrap interval.

    The same clusters are drawn for both, so that shared variation cancels.

    Args:
        numerators: the first sample.
        denominators: the second sample.
        clusters: as for `mean_interval`.
        level: as for `mean_interval`.
        seed: as for `mean_interval`.

    Raises:
        ValueError: as `mean_interval`, or the denominators sum to 0.
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
