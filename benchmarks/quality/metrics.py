"""How far a video's motion is from a known one, and how steady its pictures are.

Paths are float [T, 2], (row, column) in pixels; errors are pixels unless said otherwise.
"""

from itertools import pairwise

import numpy as np

from benchmarks.quality.adherence import bilinear
from benchmarks.synthetic.clips import SyntheticClip
from diffsynth.data.tensors import Video
from diffsynth.evaluation.tracking import Track, video_array
from diffsynth.planning.objects import distance_from_background

SPAN = 4  # frames from one latent frame of Wan2.1 to the next
# Steps shorter than this over a span have no direction to speak of.
LEAST_STEP = 0.5
_ENLARGE = 2


def trajectory_error(track: Track, true_centroids: np.ndarray) -> float:
    """Mean distance between where the object is and where it should be, over all frames.

    true_centroids: [T, 2]. Raises ValueError if the two have not the same number of frames.
    """
    return float(_distances(track.centroids, _checked(track, true_centroids)).mean())


def relative_trajectory_error(track: Track, true_centroids: np.ndarray) -> float:
    """`trajectory_error` over the length of the true path. Raises ValueError for a true path that rests."""
    length = _distances(true_centroids[1:], true_centroids[:-1]).sum()
    if length == 0:
        raise ValueError("true_centroids rest: no error is relative to a path without length")
    return trajectory_error(track, true_centroids) / float(length)


def displacement_error(track: Track, true_centroids: np.ndarray) -> float:
    """Mean distance of the two paths after each is shifted to mean 0: their form alone, not the place."""
    true = _checked(track, true_centroids)
    own = track.centroids
    return float(_distances(own - own.mean(0), true - true.mean(0)).mean())


def velocity_cosine(track: Track, true_centroids: np.ndarray, span: int = SPAN) -> float:
    """Mean cosine, -1 to 1, between the steps over `span` frames of the two paths.

    Only where the truth moves; a track that rests there has cosine 0. Raises ValueError for a span that
    leaves no step, and for a truth that moves nowhere.
    """
    true = _checked(track, true_centroids)
    if not 1 <= span < len(true):
        raise ValueError(f"span must be in 1..{len(true) - 1} for {len(true)} frames; got {span!r}")
    own, true = (path[span:] - path[:-span] for path in (track.centroids, true))
    moving = np.linalg.norm(true, axis=-1) >= LEAST_STEP
    if not moving.any():
        raise ValueError(f"true_centroids move less than {LEAST_STEP} px over {span} frames everywhere")
    own, true = own[moving], true[moving]
    lengths = np.linalg.norm(own, axis=-1).clip(min=LEAST_STEP) * np.linalg.norm(true, axis=-1)
    return float(((own * true).sum(-1) / lengths).mean())


def flow_error(frames: Video, clip: SyntheticClip, span: int = SPAN) -> float:
    """Mean endpoint error of the video's dense motion over `span` frames against a clip's known one.

    Compared are the pixels of the clip's front object, for every frame that has one `span` frames later.
    Motion is estimated by OpenCV's DIS flow between neighbouring frames, followed from frame to frame: over
    four frames at once, what is plain and moves far is lost. The flow is that of the distance from the
    background's colours, at twice the size: patterns that the object moves over do not disturb it.
    On the clips' own frames the error is 1 px, and 3 px for those that spin, against displacements of 17 px.
    Raises ImportError without OpenCV, ValueError if frames and clip differ in size or have no span.
    """
    video = video_array(frames)
    if video.shape != clip.frames.shape:
        raise ValueError(f"frames {list(video.shape)} and clip {list(clip.frames.shape)} must have one size")
    if not 1 <= span < len(video):
        raise ValueError(f"span must be in 1..{len(video) - 1} for {len(video)} frames; got {span!r}")
    flows = _neighbour_flows(video)
    errors = []
    for start in range(len(video) - span):
        mask = clip.masks[-1, start]
        origin = np.argwhere(mask) + 0.5
        places = origin
        for flow in flows[start : start + span]:
            places = places + bilinear(flow, places - 0.5)
        errors.append(np.linalg.norm(places - origin - clip.displacement(start, start + span)[mask], axis=-1))
    return float(np.concatenate(errors).mean())


def _neighbour_flows(video: np.ndarray) -> list[np.ndarray]:
    """Where each pixel goes from each frame to the next: T - 1 times float32 [H, W, 2], (rows, columns)."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError('flow_error needs OpenCV: pip install "fastvmt[eval]"') from error
    estimate = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    height, width = video.shape[1:3]
    far = distance_from_background(video)
    grey = (far * (255 / max(float(far.max()), 1.0))).round().astype(np.uint8)
    large = [cv2.resize(frame, (_ENLARGE * width, _ENLARGE * height)) for frame in grey]
    flows = []
    for a, b in pairwise(large):
        flow = cv2.resize(estimate.calc(a, b, None), (width, height), interpolation=cv2.INTER_AREA)
        flows.append(flow[..., ::-1] / _ENLARGE)  # OpenCV's are (columns, rows)
    return flows


def temporal_consistency(frames: Video, track: Track) -> tuple[float, float]:
    """How alike neighbouring frames are, (object, background), each 1 for perfect and 0 for black to white.

    1 - mean absolute difference of RGB from 0 to 1. The object: its pixels in the earlier frame, looked up
    where the track has taken them in the later one; 0 for a pair of frames of which one has no object. The
    background: pixels outside of the object, and not beside it, in both frames. Spin and growth count as
    change, in the reference as well.
    Raises ValueError if frames and track differ in size, or have fewer than two frames.
    """
    video = video_array(frames).astype(np.float32) / 255
    if video.shape[:3] != track.masks.shape or len(video) < 2:
        raise ValueError(
            f"frames {list(video.shape)} must be two or more, and of the track's {list(track.masks.shape)}"
        )
    thick = widened(track.masks)
    steady, still = [], []
    for t in range(len(video) - 1):
        outside = ~(thick[t] | thick[t + 1])
        if outside.any():
            still.append(1 - np.abs(video[t + 1] - video[t])[outside].mean())
        if track.found[t] and track.found[t + 1]:
            origin = np.argwhere(track.masks[t])
            moved = bilinear(video[t + 1], origin + track.centroids[t + 1] - track.centroids[t])
            steady.append(1 - np.abs(moved - video[t][track.masks[t]]).mean())
        else:
            steady.append(0.0)
    return float(np.mean(steady)), float(np.mean(still)) if still else 1.0


def widened(masks: np.ndarray) -> np.ndarray:
    """Masks [T, H, W] and the pixels beside them, corners included."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    height, width = masks.shape[1:]
    return np.any([padded[:, a : a + height, b : b + width] for a in range(3) for b in range(3)], axis=0)


def _checked(track: Track, true_centroids: np.ndarray) -> np.ndarray:
    true = np.asarray(true_centroids)
    if true.shape != track.centroids.shape:
        raise ValueError(
            f"true_centroids must be {list(track.centroids.shape)}, as the track; got {list(true.shape)}"
        )
    return true


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.asarray(one) - other, axis=-1)
