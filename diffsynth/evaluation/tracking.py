"""Track the one object of a video by its colour, which differs from the background's in each frame.

A background of one colour, lit unevenly or checkered, is a stretch of a ray in RGB: its colour at different
brightness. The object is the largest connected patch that is far from it. No motion is assumed, so that a
video that does not follow its reference is tracked as well as one that does.
"""

from dataclasses import dataclass

import numpy as np

from diffsynth.data.frames import rgb_frames
from diffsynth.data.tensors import Video
from diffsynth.planning.objects import LEAST_AREA, LEAST_DISTANCE, distance_from_background, largest_patches


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """An object's path through a video of T frames.

    Attributes:
        centroids: float32 [T, 2], (row, column) in pixels, the first pixel's centre at 0.5. Frames without
            the object have a position between their neighbours; without any, it is the picture's middle.
        found: bool [T], whether the frame shows the object.
        masks: bool [T, H, W], its pixels.
        colour: float32 [3], median RGB of its pixels over the video; the background's if it is never found.
        background: float32 [3], median RGB of all pixels that are near the background.
    """

    centroids: np.ndarray
    found: np.ndarray
    masks: np.ndarray
    colour: np.ndarray
    background: np.ndarray


def video_array(frames: Video) -> np.ndarray:
    """Return a video as uint8 [T, H, W, 3]; TypeError, ValueError that names a frame that is none."""
    return np.stack([np.asarray(frame) for frame in rgb_frames(frames)])


def track_object(frames: Video) -> Track:
    """Track the largest object of a video with a camera at rest.

    A pixel belongs to the object if it is at least half as far from the background's colours as the object
    is, so that a soft edge counts up to its middle.

    Args:
        frames: the video.

    Raises:
        TypeError, ValueError: a frame is none; the message names it.
    """
    video = video_array(frames)
    far = distance_from_background(video)
    masks = largest_patches(far > LEAST_DISTANCE)
    if masks.any():
        masks = largest_patches(far > max(LEAST_DISTANCE, float(np.median(far[masks])) / 2))
    masks &= (masks.sum((1, 2)) >= LEAST_AREA * masks[0].size)[:, None, None]
    background = np.median(video[far <= LEAST_DISTANCE], axis=0)
    colour = np.median(video[masks], axis=0) if masks.any() else background
    found = np.asarray(masks.any((1, 2)))
    return Track(
        centroids=_centroids(masks, found),
        found=found,
        masks=masks,
        colour=colour.astype(np.float32),
        background=background.astype(np.float32),
    )


def _centroids(masks: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return means of mask pixels (row, column), interpolated where there are none: float32 [T, 2]."""
    num_frames, height, width = masks.shape
    if not found.any():
        return np.tile(np.array([height / 2, width / 2], np.float32), (num_frames, 1))
    areas = masks.sum((1, 2))[found]
    rows = masks[found].sum(2) @ (np.arange(height) + 0.5) / areas
    cols = masks[found].sum(1) @ (np.arange(width) + 0.5) / areas
    filled = [np.interp(np.arange(num_frames), np.flatnonzero(found), values) for values in (rows, cols)]
    return np.stack(filled, axis=-1).astype(np.float32)
