"""Track a grid of points through a video: the tracklets that motion fidelity compares.

Two trackers: OpenCV's pyramidal Lucas-Kanade, which needs no weights, and CoTracker3 (Karaev et al. 2024),
whose family the published figures come from, if its code and weights are here. Nothing is downloaded.
"""

import importlib.util
import logging
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from diffsynth.data.frames import checked_int
from diffsynth.data.tensors import Video
from diffsynth.evaluation.tracking import video_array
from diffsynth.vram_management.memory import choose_device

logger = logging.getLogger(__name__)

METHODS = ("auto", "lk", "cotracker")
COTRACKER_WEIGHTS = "scaled_offline.pth"
_COTRACKER_REPOSITORY = "facebookresearch_co-tracker_main"
_COTRACKER_URL = f"https://huggingface.co/facebook/cotracker3/resolve/main/{COTRACKER_WEIGHTS}"
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


def track_points(
    frames: Video,
    *,
    method: str = "auto",
    grid: int = 40,
    checkpoint: str | PathLike | None = None,
    device: str | torch.device = "auto",
) -> Tracklets:
    """Track grid x grid points, spread evenly over frame 0, through all frames.

    A point that Lucas-Kanade has lost stays lost, and is reported at the position at which it was last seen.

    Args:
        frames: the video.
        method: "lk" (Lucas-Kanade), "cotracker", or "auto": CoTracker if its code and weights are here, else
            Lucas-Kanade; the log says which.
        grid: points in a row and in a column.
        checkpoint: CoTracker3's offline weights; None to look for them in torch.hub's cache.
        device: where CoTracker runs; Lucas-Kanade runs on the CPU.

    Raises:
        ValueError: the method is unknown, the grid is below 1, or weights are given to "lk" or are those of
            another model.
        FileNotFoundError: CoTracker's weights are missing.
        ImportError: CoTracker's code or OpenCV is missing.
        TypeError: a frame is none; also as a ValueError.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if method == "lk" and checkpoint is not None:
        raise ValueError(f"checkpoint {checkpoint} is CoTracker's: method 'lk' has no weights")
    grid = checked_int("grid", grid)
    if method == "auto":
        reason = None if checkpoint is not None else _cotracker_fault()
        method = "cotracker" if reason is None else "lk"
        logger.info("points are tracked by %s%s", method, f" ({reason})" if reason else "")
    if method == "cotracker":
        model = _load_cotracker(checkpoint, choose_device(device))
        return _track_cotracker(model, video_array(frames), grid)
    return _track_lk(video_array(frames), grid)


def _grid_points(height: int, width: int, grid: int) -> np.ndarray:
    """Return the centres of grid x grid cells: float32 [N, 2], the first pixel's centre at 0.5."""
    steps = (np.arange(grid) + 0.5) / grid
    rows, cols = np.meshgrid(steps * height, steps * width, indexing="ij")
    return np.stack([rows.ravel(), cols.ravel()], axis=-1).astype(np.float32)


def _track_lk(video: np.ndarray, grid: int) -> Tracklets:
    try:
        import cv2
    except ImportError as error:
        raise ImportError('tracking by "lk" needs OpenCV: pip install "fastvmt[eval]"') from error
    height, width = video.shape[1:3]
    positions = _grid_points(height, width, grid)
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


def _hub_folder() -> Path:
    return Path(torch.hub.get_dir())


def _cotracker_fault() -> str | None:
    """Return why CoTracker cannot be used here, or None if it can."""
    weights = _hub_folder() / "checkpoints" / COTRACKER_WEIGHTS
    if not weights.is_file():
        return f"there is no {weights}"
    if importlib.util.find_spec("cotracker") or (_hub_folder() / _COTRACKER_REPOSITORY).is_dir():
        return None
    return "CoTracker's code is not installed"


def _load_cotracker(checkpoint: str | PathLike | None, device: torch.device) -> torch.nn.Module:
    """Load CoTracker3's offline predictor, from the installed package or torch.hub's copy of its code."""
    weights = _hub_folder() / "checkpoints" / COTRACKER_WEIGHTS if checkpoint is None else Path(checkpoint)
    if not weights.is_file():
        raise FileNotFoundError(
            f"CoTracker's weights {weights} do not exist: put {_COTRACKER_URL} there, "
            "or give checkpoint, or track with method 'lk'"
        )
    repository = _hub_folder() / _COTRACKER_REPOSITORY
    if importlib.util.find_spec("cotracker"):
        code = importlib.import_module("cotracker.predictor")
        predictor = code.CoTrackerPredictor(checkpoint=None, window_len=60, v2=False)
    elif repository.is_dir():
        predictor = torch.hub.load(str(repository), "cotracker3_offline", source="local", pretrained=False)
    else:
        raise ImportError(
            "method 'cotracker' needs the package cotracker: install "
            f"https://github.com/facebookresearch/co-tracker, or clone it to {repository}"
        )
    state = torch.load(weights, map_location="cpu", weights_only=True)
    try:
        predictor.model.load_state_dict(state.get("model", state))
    except RuntimeError as error:
        raise ValueError(f"checkpoint {weights} is not CoTracker3's {COTRACKER_WEIGHTS}: {error}") from error
    return predictor.to(device).eval()


def _track_cotracker(model: torch.nn.Module, video: np.ndarray, grid: int) -> Tracklets:
    device = next(model.parameters()).device
    points = _grid_points(video.shape[1], video.shape[2], grid)
    positions = torch.from_numpy(points[:, ::-1] - 0.5)  # CoTracker: (frame, column, row), first centre at 0
    queries = torch.cat([torch.zeros(len(positions), 1), positions], dim=-1)
    clip = torch.from_numpy(video).permute(0, 3, 1, 2).float()  # 0 to 255
    with torch.no_grad():
        tracks, visible = model(clip[None].to(device), queries=queries[None].to(device))
    return Tracklets(
        points=(tracks[0].flip(-1) + 0.5).transpose(0, 1).float().cpu().numpy(),
        visible=visible[0].transpose(0, 1).bool().cpu().numpy(),
    )
