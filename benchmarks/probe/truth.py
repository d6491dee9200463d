"""The true motion of a clip with known motion, and how well a reading agrees with it.

Axes: F latent frames, H/W token rows/columns, P frame pairs, M tokens compared. Displacements are (row,
column) in tokens.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.synthetic.clips import SyntheticClip
from diffsynth.motion.flow import frame_pairs

TOKENS = ("object", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrueFlow:
    """True motion of a clip on the token grid.

    Attributes:
        pairs: P pairs (i, j) of latent frames, i < j.
        flow: float32 [P, H, W, 2], displacement from i to j in tokens; 0 where a token is not counted.
        counted: bool [P, H, W], the tokens of frame i to compare.
    """

    pairs: list[tuple[int, int]]
    flow: np.ndarray
    counted: np.ndarray

    @property
    def blind(self) -> np.ndarray:
        """Return the reading of attention that sees nothing: the way to the middle, [P, H, W, 2]."""
        grid = np.array(self.counted.shape[1:])
        way = (grid - 1) / 2 - np.moveaxis(np.mgrid[: grid[0], : grid[1]], 0, -1)
        return np.broadcast_to(way, self.flow.shape)


def true_flow(
    clip: SyntheticClip,
    *,
    token_size: tuple[int, int],
    temporal_factor: int = 4,
    sf: int = 4,
    tokens: str = "object",
) -> TrueFlow:
    """Return the displacements of a perfect reading, for pairs of latent frames i < j < i + sf.

    Latent frame 0 is frame 0; latent frame i > 0 covers the `temporal_factor` frames up to frame
    i * temporal_factor (beyond the clip's end, repeats of its last one). A point's position in it is the mean
    over these; what a token shows is taken from the middle one (the later of two). A token belongs to a
    layer, background or object, with at least half of its pixels, and moves by the mean over these. Tokens
    that end outside of the picture do not count, since there is nothing to attend to; an end behind another
    object counts.

    Args:
        clip: with known motion.
        token_size: (rows, columns) of pixels of a token.
        temporal_factor: frames in a latent frame.
        sf: the span of the pairs.
        tokens: "object" counts the tokens of objects; "all" counts those of the background, too.

    Raises:
        ValueError: sizes do not fit, the clip has one latent frame only, or `tokens` is another word.
    """
    num_frames, height, width = clip.frames.shape[:3]
    if height % token_size[0] or width % token_size[1]:
        raise ValueError(
            f"clips must be whole tokens of {token_size[0]} x {token_size[1]} pixels in size; "
            f"got {height} x {width}"
        )
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {', '.join(TOKENS)}; got {tokens!r}")
    num_latents = -(-(num_frames - 1) // temporal_factor) + 1
    if num_latents < 2 or sf < 2:
        raise ValueError(f"motion needs two latent frames and sf >= 2; got {num_frames} frames, sf={sf}")
    covered = [_frames_of(i, temporal_factor, num_frames) for i in range(num_latents)]
    pairs = [(i, j) for i, j in frame_pairs(num_latents, sf) if i != j]
    flow, counted = list[np.ndarray](), list[np.ndarray]()
    for i in range(num_latents - 1):
        middle = covered[i][len(covered[i]) // 2]
        pixels = _pixels_of_layers(clip, middle, token_size, tokens)
        later = [j for first, j in pairs if first == i]
        here, *there = (_mean_moves(clip, middle, covered[j], pixels) for j in (i, *later))
        for moved in there:
            step = (moved - here) / token_size
            flow.append(step)
            counted.append(pixels.any((1, 3)) & _ends_inside(step))
    mask = np.stack(counted)
    return TrueFlow(pairs=pairs, flow=(np.stack(flow) * mask[..., None]).astype(np.float32), counted=mask)


def _frames_of(latent: int, temporal_factor: int, num_frames: int) -> list[int]:
    """Return the frames that a latent frame covers, in order."""
    last = temporal_factor * latent
    first = 0 if latent == 0 else last - temporal_factor + 1
    return [min(t, num_frames - 1) for t in range(first, last + 1)]


def _by_token(pixels: np.ndarray, token_size: tuple[int, int]) -> np.ndarray:
    """Split pixels into tokens: [rows, columns, ...] -> [H, th, W, tw, ...]."""
    (th, tw), (rows, cols) = token_size, pixels.shape[:2]
    return pixels.reshape(rows // th, th, cols // tw, tw, *pixels.shape[2:])


def _pixels_of_layers(
    clip: SyntheticClip, frame: int, token_size: tuple[int, int], tokens: str
) -> np.ndarray:
    """Return the pixels of the layer that each token belongs to, if any: bool [H, th, W, tw]."""
    masks = clip.masks[:, frame]
    if tokens == "all":
        masks = np.concatenate([~masks.any(0, keepdims=True), masks])
    chosen = np.zeros_like(_by_token(masks[0], token_size))
    for mask in masks:
        layer = _by_token(mask, token_size)
        chosen = np.where(layer.mean((1, 3), keepdims=True) >= 0.5, layer, chosen)
    return chosen


def _mean_moves(clip: SyntheticClip, start: int, ends: list[int], pixels: np.ndarray) -> np.ndarray:
    """Return how a token's chosen pixels move from `start` to the mean of `ends`: [H, W, 2] in pixels."""
    token_size = pixels.shape[1::2]
    weights = pixels / np.maximum(pixels.sum((1, 3), keepdims=True), 1)
    moves = [
        np.einsum("hawb,hawbc->hwc", weights, _by_token(clip.displacement(start, t), token_size))
        for t in ends
    ]
    return np.mean(moves, axis=0)


def _ends_inside(step: np.ndarray) -> np.ndarray:
    """Return which tokens end in the picture: [H, W, 2] -> bool [H, W]."""
    grid = np.array(step.shape[:2])
    ends = np.moveaxis(np.mgrid[: grid[0], : grid[1]], 0, -1) + step
    return ((ends >= -0.5) & (ends <= grid - 0.5)).all(-1)


def moments(true: np.ndarray, read: np.ndarray, blind: np.ndarray) -> np.ndarray:
    """Return the sums that `agreement` needs; samples are pooled by adding them up.

    Args:
        true: displacements [M, 2].
        read: displacements [..., M, 2].
        blind: displacements [M, 2] of attention that sees nothing.

    Returns:
        float64 [..., 4, 4], sums over tokens and both components of all products of 1, true, read and blind.
    """
    parts = np.broadcast_arrays(np.ones(()), true, read, blind)
    samples = np.stack([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1).astype(np.float64)
    return np.swapaxes(samples, -1, -2) @ samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Agreement of read with true displacements, each array [...]; a perfect reading has 1 in all four.

    The partial numbers are those of what is left of both when the prediction of `blind` by a straight line is
    taken off, for each distance in time separately. Attention that sees nothing has 0 there.

    Attributes:
        correlation: Pearson's, over all samples.
        slope: least squares of read on true, with an intercept, over all samples.
        partial_correlation: Pearson's, of what is left.
        partial_slope: the slope of what is left.
    """

    correlation: np.ndarray
    slope: np.ndarray
    partial_correlation: np.ndarray
    partial_slope: np.ndarray


def agreement(sums: np.ndarray) -> Agreement:
    """Return the agreement of pooled samples. A reading that never changes has correlation 0.

    Args:
        sums: `moments` by distance in time, [..., distances, 4, 4].

    Raises:
        ValueError: the truth never changes.
    """
    spread, by_distance = _covariances(sums.sum(-3)), _covariances(sums)
    shared = by_distance[..., :2, 2:]
    own = np.where(by_distance[..., 2:, 2:] > 1e-9, by_distance[..., 2:, 2:], np.inf)
    left = (by_distance[..., :2, :2] - shared @ np.swapaxes(shared, -1, -2) / own).sum(-3)
    # Against the whole spread: what rounding leaves of a reading that is all blind is nothing.
    floor = 1e-9 * spread[..., (0, 1), (0, 1)]
    whole, partial = _correlation_and_slope(spread, floor), _correlation_and_slope(left, floor)
    return Agreement(
        correlation=whole[0], slope=whole[1], partial_correlation=partial[0], partial_slope=partial[1]
    )


def _covariances(sums: np.ndarray) -> np.ndarray:
    """Return the covariances of true, read and blind, times the count: [..., 4, 4] -> [..., 3, 3]."""
    means = sums[..., 0, 1:] / np.maximum(sums[..., :1, 0], 1)
    return sums[..., 1:, 1:] - sums[..., 1:, :1] * means[..., None, :]


def _correlation_and_slope(covariance: np.ndarray, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    true, read, product = covariance[..., 0, 0], covariance[..., 1, 1], covariance[..., 0, 1]
    if (true <= np.maximum(floor[..., 0], 1e-9)).any():
        raise ValueError("the clips have no motion to compare with (no tokens, or all move alike); take more")
    still = read <= np.maximum(floor[..., 1], 1e-12)
    correlation = np.where(still, 0.0, product / np.sqrt(np.where(still, 1.0, true * read)))
    return correlation.clip(-1, 1), product / true


def moments_by_distance(truth: TrueFlow, read: np.ndarray, sf: int) -> np.ndarray:
    """Return the moments of a reading by distance in time, 1 to sf - 1 latent frames.

    Args:
        truth: true motion, of which M tokens are counted.
        read: displacements [..., M, 2].
        sf: the span of the pairs.

    Returns:
        [..., sf - 1, 4, 4], as `moments`.
    """
    distances = np.array([j - i for i, j in truth.pairs]).repeat(truth.counted.sum((1, 2)))
    true, blind = truth.flow[truth.counted], truth.blind[truth.counted]
    return np.stack(
        [moments(true[at], read[..., at, :], blind[at]) for at in (distances == d for d in range(1, sf))],
        axis=-3,
    )
