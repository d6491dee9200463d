"""Motion fidelity: how alike the directions of motion in two videos are, whatever the videos show.

Yatim et al., "Space-Time Diffusion Features for Zero-Shot Text-Driven Motion Transfer" (CVPR 2024): the
measure that DiTFlow and FastVMT report too. With the steps v_k of a tracklet from frame to frame,

    corr(a, b) = mean over k of  v_k(a) . v_k(b) / (|v_k(a)| |v_k(b)|)
    score      = mean over generated a of max over reference b of corr(a, b)
               + mean over reference b of max over generated a of corr(a, b).

Here the score is half of that sum, so that it lies in -1 to 1. The code published with the paper takes the
first mean alone. Two limits of the measure: where a motion happens does not count, so that a camera that goes
forwards and one that goes backwards agree; and for the best match a handful of tracklets is enough, so that
real videos with unlike motion reach 0.7 to 0.8. `paired_fidelity` has neither.
"""

from collections.abc import Callable

import numpy as np

from diffsynth.data.tensors import Video
from diffsynth.evaluation.trackers import Tracklets, track_points

# Shorter steps, in pixels a frame, are rest: what is left of a still picture after compression.
LEAST_STEP = 0.1
# A tracklet counts if it is seen in this share of its steps; a short one would find its like by chance.
LEAST_SEEN = 0.5
_ROWS = 512  # tracklets that are compared at once with all of the other video


def motion_fidelity(
    generated: Video, reference: Video, *, tracker: Callable[[Video], Tracklets] = track_points
) -> float:
    """Return the score of two videos of as many frames, -1 to 1; a video and itself score 1.

    Scores of different trackers, grids or frame counts are not comparable.

    Args:
        generated: the video to measure.
        reference: the video whose motion it follows; its size may differ.
        tracker: tracks a video; by default Lucas-Kanade, at 40 x 40 points.

    Raises:
        What the tracker and `tracklet_fidelity` raise.
    """
    return tracklet_fidelity(tracker(generated), tracker(reference))


def tracklet_fidelity(generated: Tracklets, reference: Tracklets, *, least_step: float = LEAST_STEP) -> float:
    """Return the score of two sets of tracklets over as many frames, -1 to 1.

    Where the published formula says nothing: two rests agree (1), rest and motion neither agree nor disagree
    (0). corr is the mean over the steps in which both points are seen at either end; it is divided by half of
    all steps if those are fewer. Tracklets seen in less than half of their steps are left out. Steps shorter
    than least_step, in pixels, are rest.

    Raises:
        ValueError: the frame counts differ or are below 2, least_step is negative, or no tracklet of a video
            is seen long enough.
    """
    _check(generated, reference, least_step)
    own, own_seen = _kept("generated", *_directions(generated, least_step))
    other, other_seen = _kept("reference", *_directions(reference, least_step))
    fewest = LEAST_SEEN * own_seen.shape[1]
    best_of_own = np.empty(len(own), np.float32)
    best_of_other = np.full(len(other), -np.inf, np.float32)
    for start in range(0, len(own), _ROWS):
        rows = slice(start, start + _ROWS)
        corr = own[rows] @ other.T / np.maximum(own_seen[rows] @ other_seen.T, fewest)
        best_of_own[rows] = corr.max(1)
        np.maximum(best_of_other, corr.max(0), out=best_of_other)
    return float(np.clip((best_of_own.mean() + best_of_other.mean()) / 2, -1, 1))


def paired_fidelity(generated: Tracklets, reference: Tracklets, *, least_step: float = LEAST_STEP) -> float:
    """Return the mean corr, -1 to 1, of the tracklets that start at the same place of the same grid.

    This measure is not published. Unlike `tracklet_fidelity` it asks that motion happens at the same place,
    and a few tracklets that go astray hardly change it. It is fair only to methods that keep the layout.
    Pairs seen together in less than half of their steps are left out.

    Args:
        generated: tracklets of the video to measure.
        reference: tracklets of the reference, from the same grid.
        least_step: as for `tracklet_fidelity`.

    Raises:
        ValueError: the sets differ in size, no pair is left, or as `tracklet_fidelity`.
    """
    _check(generated, reference, least_step)
    if len(generated.points) != len(reference.points):
        raise ValueError(
            "generated and reference must be tracked on one grid; got "
            f"{len(generated.points)} and {len(reference.points)} tracklets"
        )
    own, own_seen = _directions(generated, least_step)
    other, other_seen = _directions(reference, least_step)
    common = (own_seen * other_seen).sum(1)
    kept = common >= LEAST_SEEN * own_seen.shape[1]
    if not kept.any():
        raise ValueError(f"none of {len(kept)} pairs of tracklets is seen in {LEAST_SEEN:.0%} of its steps")
    return float(np.clip(((own * other).sum(1)[kept] / common[kept]).mean(), -1, 1))


def _check(generated: Tracklets, reference: Tracklets, least_step: float) -> None:
    own, other = generated.points.shape[1], reference.points.shape[1]
    if own != other or own < 2:
        raise ValueError(
            f"generated and reference must have as many frames, at least 2; got {own} and {other}"
        )
    if not least_step >= 0:
        raise ValueError(f"least_step must be 0 or more pixels; got {least_step!r}")


def _directions(tracklets: Tracklets, least_step: float) -> tuple[np.ndarray, np.ndarray]:
    """Return unit steps, float32 [N, (T - 1) * 3], and which of them are seen, float32 [N, T - 1].

    A step is (row, column, 0), (0, 0, 1) at rest, or zeros if unseen, so that a product is an agreement.
    """
    steps = np.diff(tracklets.points, axis=1)
    seen = tracklets.visible[:, 1:] & tracklets.visible[:, :-1]
    lengths = np.linalg.norm(steps, axis=-1, keepdims=True)
    moves = lengths >= max(least_step, np.finfo(np.float32).tiny)
    units = np.divide(steps, lengths, out=np.zeros_like(steps), where=moves)
    agreement = np.concatenate([units, ~moves], axis=-1) * seen[..., None]
    return agreement.reshape(len(agreement), -1).astype(np.float32), seen.astype(np.float32)


def _kept(name: str, directions: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return those of the tracklets that are seen long enough."""
    kept = seen.mean(1) >= LEAST_SEEN
    if not kept.any():
        raise ValueError(
            f"{name}: none of {len(kept)} tracklets is seen in {LEAST_SEEN:.0%} of its steps; the video has "
            "too little texture, or too much changes from frame to frame"
        )
    return directions[kept], seen[kept]
