"""Measure how well a video follows its reference if each shows one object, and show them side by side."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from PIL import Image

from diffsynth.data import fit_frame
from diffsynth.data.frames import rgb_frames
from diffsynth.data.tensors import Video
from diffsynth.evaluation.drawing import draw_trajectories
from diffsynth.evaluation.grid import side_by_side
from diffsynth.evaluation.tracking import Track, track_object, video_array
from diffsynth.planning.objects import LEAST_DISTANCE, distance_from_background

_LARGEST, _REST = 0.5, 0.06  # largest shares of the picture: of the object, and of the rest of the foreground
# Largest standard deviation of a plain background, in levels of 255; generated: up to 12, real: 28 or more.
_PLAIN = 16.0


def one_object(frames: Video) -> Track | None:
    """Return the track of a video's only object in front of a plain background; None for other videos."""
    video = video_array(frames)
    return _one_object(video.tobytes(), video.shape)


@lru_cache(maxsize=1)  # the comparison video, its sheet and its text need the same track
def _one_object(pixels: bytes, shape: tuple[int, ...]) -> Track | None:
    video = np.frombuffer(pixels, np.uint8).reshape(shape)
    far = distance_from_background(video) > LEAST_DISTANCE
    # Reject other videos before tracking, which takes minutes in a real clip.
    if far.all() or far.mean() > _LARGEST + _REST or video.mean(-1)[~far].std() > _PLAIN:
        return None
    for step in (8, 1):  # every 8th frame suffices to reject most real clips, in an eighth of the time
        track = track_object(video[::step])
        alone = track.masks.mean() <= _LARGEST and (far[::step] & ~track.masks).mean() <= _REST
        if not (alone and track.found.all()):
            return None
    return track


def path_agreement(path: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the mean distance of two paths [T, 2] in pixels, and the cosine (-1..1) of their velocities."""
    distance = float(np.linalg.norm(path - reference, axis=1).mean())
    own, other = (np.diff(points, axis=0).ravel() for points in (path, reference))
    return distance, float(own @ other / max(np.linalg.norm(own) * np.linalg.norm(other), 1e-9))


def path_words(path: np.ndarray, fps: float) -> str:
    """Return a path [T, 2] of (row, column) in words: "moves 41 px right, turns back at 0.7 s"."""
    rows, cols = path[-1] - path[0]
    sides = ((cols, "right", "left"), (rows, "down", "up"))
    parts = [f"{abs(by):.0f} px {plus if by > 0 else minus}" for by, plus, minus in sides if abs(by) >= 1]
    text = f"moves {', '.join(parts)}" if parts else "ends where it begins"
    # Compare displacements over a window, since those from frame to frame are noisy.
    ahead = max(1, len(path) // 8)
    steps = path[ahead:] - path[:-ahead]
    turns = (steps[ahead:] * steps[:-ahead]).sum(1) < -1
    starts = [t for t in range(len(turns)) if turns[t] and not (t and turns[t - 1])]
    times = [f"{(t + ahead) / fps:.1f} s" for t in starts]
    return f"{text}, turns back at {', '.join(times)}" if times else text


def fitted(reference: Video, frames: Video) -> list[Image.Image]:
    """Return the frames of a reference, cut to the number of a video's frames and fitted to their size."""
    width, height = next(rgb_frames(frames)).size
    return [fit_frame(frame, height, width) for frame, _ in zip(rgb_frames(reference), frames, strict=False)]


def beside_reference(videos: Mapping[str, Video], height: int = 256) -> list[Image.Image]:
    """Place videos in a row, `height` pixels high, with paths if `with_paths` can draw them."""
    return side_by_side(with_paths(videos) or videos, height)


def with_paths(videos: Mapping[str, Video]) -> dict[str, Video] | None:
    """Draw paths into videos of equal size; None unless each shows only one object.

    The first video is the reference; its path is drawn into the others as well.
    """
    tracks = {name: one_object(frames) for name, frames in videos.items()}
    paths = [track.centroids for track in tracks.values() if track is not None]
    if len(paths) < len(tracks):
        return None
    drawn: dict[str, Video] = {}
    for (name, frames), path in zip(videos.items(), paths, strict=True):
        drawn[name] = draw_trajectories(frames, [path] if path is paths[0] else [path, paths[0]])
    return drawn


def follow_text(frames: Video, reference: Video) -> str | None:
    """Return a sentence on how well a video follows its reference; None unless both show only one object."""
    tracks = [one_object(video) for video in (frames, fitted(reference, frames))]
    if tracks[0] is None or tracks[1] is None:
        return None
    distance, cosine = path_agreement(tracks[0].centroids, tracks[1].centroids)
    width = tracks[0].masks.shape[2]
    return (
        f"the object's path is {distance:.1f} px from the reference's on average (frame width {width} px); "
        f"cosine of the velocities {cosine:.2f} (1: the same motion, 0: unrelated)"
    )
