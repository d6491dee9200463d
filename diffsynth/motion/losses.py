"""Losses of guidance (paper section 3.3): distance of two flows, and unrest inside the windows.

    amf    = mean over pairs of  w_ij * token_scale * mean over tokens of |flow_ij - flow_ref_ij|^2
    window = mean | mean K in the window, frame j+1  -  the same, frame j |,  j running over the pairs of i

Axes: F latent frames, H/W token rows/columns, P frame pairs, T tiles, d feature width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsynth.models.tables import table

Pairs = list[tuple[int, int]]


def pair_weights(
    pairs: Sequence[tuple[int, int]], sf: int, weights: tuple[float, float], intra_weight: float
) -> list[float]:
    """Return the weight of each pair: linear from weights[0] (j = i) to weights[1] (j = i + sf - 1).

    Pairs j = i, which hold the layout but no motion, are multiplied by intra_weight.
    """
    first, last = weights
    falling = [first + (last - first) * (j - i) / max(sf - 1, 1) for i, j in pairs]
    return [w * intra_weight if i == j else w for w, (i, j) in zip(falling, pairs, strict=True)]


def amf_loss(flow: Tensor, reference: Tensor, weights: list[float], token_scale: float | None) -> Tensor:
    """Return the weighted squared distance of two flows [P, H, W, 2] (or [P, S, 2]), a scalar.

    Args:
        flow, reference: flows of the same pairs.
        weights: weight of each of the P pairs.
        token_scale: factor on the mean over tokens; None sums over them.

    Raises:
        ValueError: the shapes differ.
    """
    if flow.shape != reference.shape:
        raise ValueError(f"flow is {tuple(flow.shape)} but its reference is {tuple(reference.shape)}")
    distance = (flow - reference).square().sum(-1).flatten(1)
    per_pair = distance.sum(1) if token_scale is None else distance.mean(1) * token_scale
    return (per_pair * table(tuple(weights), per_pair.device, per_pair.dtype)).mean()


def window_means(k: Tensor, pairs: Pairs, windows: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return the mean key of each tile's window in frame j: k [F, H, W, d], windows [P, T, 2] -> [P, T, d].

    It uses a summed-area table: four corners give the sum over any window.
    """
    summed = F.pad(k.cumsum(1).cumsum(2), (0, 0, 1, 0, 1, 0))
    frame = table(tuple(j for _, j in pairs), k.device)[:, None]
    top, left = windows.unbind(-1)
    bottom, right = top + sides[0], left + sides[1]
    sums = summed[frame, bottom, right] - summed[frame, top, right]
    sums = sums - summed[frame, bottom, left] + summed[frame, top, left]
    return sums / (sides[0] * sides[1])


def mean_change(means: Tensor, pairs: Pairs) -> Tensor:
    """Return the mean L2 norm of the change from (i, j) to (i, j + 1) of means [P, T, d], a scalar.

    It is averaged over the changes and tiles of each i, then over i; 0 if no frame has two later ones.
    """
    steps = [p for p in range(len(pairs) - 1) if pairs[p][0] == pairs[p + 1][0]]
    if not steps:
        return means.new_zeros(())
    first = [pairs[p][0] for p in steps]
    share = table(tuple(1 / first.count(i) / len(set(first)) for i in first), means.device, means.dtype)
    before, after = (table(tuple(p + later for p in steps), means.device) for later in (0, 1))
    changes = means[after] - means[before]
    return (torch.linalg.vector_norm(changes, dim=-1).mean(-1) * share).sum()
