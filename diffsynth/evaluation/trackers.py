"""Track a grid of points through a video: the tracklets that motion fidelity compares.

The tracker is OpenCV's pyramidal Lucas-Kanade, which needs no weights. Published figures come from the family
of CoTracker (Karaev et al.), for which there is `benchmarks/quality/cotracker.py`.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from diffsynth.data.frames import checked_int
from diffsynth.data.tensors import Video
from diffsynth.evaluation.tracking import video_array

_WINDOW = 15  # pixels that Lucas-Kanade compares around a point
_MOST_LEVELS = 4
# A point that comes back farther than this from where it left, in pixels, is lost.
_LEAST_RETURN = 1.0
# Less texture than this around a point (smaller eigenvalue of OpenCV's gradient matrix): nothing to follow.
_LEAST_TEXTURE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracklets:
    """The paths of N points through T frames.

    Attributes:
        points: float32 [N, T, 2], (row, column) in pixels, the first pixel's centre at 0.5. Where a point is
            not visible, its position is a guess.
        visible: bool [N, T].

    Raises:
        ValueError: the shapes do not fit together.
    """

    points: np.ndarray
    visible: np.ndarray

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[-1] != 2 or self.visible.shape != self.points.shape[:2]:
            raise ValueError(
                "points must be [N, T, 2] and visible [N, T]; "
                f"got {list(self.points.shape)} and {list(self.visible.shape)}"
            )


def track_points(frames: Video, *, grid: int = 40) -> Tracklets:
    """Track grid x grid points, spread evenly over frame 0, through all frames.

    A point that is lost stays lost, and is reported at the position at which it was last seen.

    Args:
        frames: the video.
        grid: points in a row and in a column.

    Raises:
        ValueError: the grid is below 1.
        ImportError: OpenCV is missing.
        TypeError: a frame is none; also as a ValueError.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError('tracking needs OpenCV: pip install "fastvmt[eval]"') from error
    video = video_array(frames)
    height, width = video.shape[1:3]
    positions = grid_points(height, width, checked_int("grid", grid))
    seen = np.ones(len(positions), bool)
    points, visible = [positions], [seen]
    # The coarsest picture must still hold a window on either side of a point.
    levels = int(np.clip(np.log2(min(height, width) / (2 * _WINDOW)), 0, _MOST_LEVELS))
    tracker = cv2.SparsePyrLKOpticalFlow.create(
        (_WINDOW, _WINDOW), maxLevel=levels, minEigThreshold=_LEAST_TEXTURE
    )
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    for a, b in pairwise(grey):
        # OpenCV: (column, row), first centre at 0.
        start = np.ascontiguousarray(positions[:, None, ::-1]) - 0.5
        end, found, _ = tracker.calc(a, b, start, np.empty_like(start))
        back, returned, _ = tracker.calc(b, a, end, np.empty_like(start))
        moved = end[:, 0, ::-1] + 0.5
        seen = seen & (found[:, 0] == 1) & (returned[:, 0] == 1)
        seen &= np.linalg.norm(back - start, axis=-1)[:, 0] < _LEAST_RETURN
        seen &= ((moved >= 0) & (moved < (height, width))).all(-1)
        positions = np.where(seen[:, None], moved, positions)
        points.append(positions)
        visible.append(seen)
    return Tracklets(points=np.stack(points, 1).astype(np.float32), visible=np.stack(visible, 1))


def grid_points(height: int, width: int, grid: int) -> np.ndarray:
    """Return the centres of grid x grid cells: float32 [N, 2], the first pixel's centre at 0.5."""
    steps = (np.arange(grid) + 0.5) / grid
    rows, cols = np.meshgrid(steps * height, steps * width, indexing="ij")
    return np.stack([rows.ravel(), cols.ravel()], axis=-1).astype(np.float32)
