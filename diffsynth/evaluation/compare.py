"""Videos beside each other, with their names."""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from diffsynth.data import VideoData, fit_frame
from diffsynth.data.frames import checked_int, rgb_frames
from diffsynth.evaluation.drawing import INK, PAPER, fitted_text, text_font
from diffsynth.evaluation.tracking import Frames

Videos = Mapping[str, VideoData | Frames]

LABEL_HEIGHT = 24  # pixels
GAP = 4
ENDS = ("shortest", "longest")
USUAL_FPS = 15.0
_MOST_IN_A_ROW = 3  # videos, unless columns are asked for


def side_by_side(videos: Videos, height: int = 256) -> list[Image.Image]:
    """Frames that show all videos in a row, each `height` pixels high under its name.

    As many frames as the shortest video has. Raises ValueError if there is no video or one has no frames.
    """
    return video_grid(videos, columns=max(len(videos), 1), height=height)


def video_grid(
    videos: Videos,
    *,
    columns: int | None = None,
    height: int = 256,
    until: str = "shortest",
    fps: float | None = None,
) -> list[Image.Image]:
    """Frames that show videos of any sizes in rows and columns, each `height` pixels high under its name.

    columns: in a row up to three videos and else about a square by default. until: the "shortest" or the
    "longest" video ends; others stay at their last frame. fps: the rate of what is made (see `common_rate`):
    a VideoData is shown at its own speed, others frame by frame; None: all frame by frame.
    Raises ValueError if there is no video or one has no frames, or for another argument out of range.
    """
    if not videos or not all(len(frames) for frames in videos.values()):
        lengths = {name: len(frames) for name, frames in videos.items()}
        raise ValueError(f"videos must be one or more, each with frames; got {lengths}")
    if until not in ENDS:
        raise ValueError(f"until must be one of {', '.join(ENDS)}; got {until!r}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be a number above 0; got {fps!r}")
    height = checked_int("height", height)
    square = math.ceil(math.sqrt(len(videos)))
    usual = len(videos) if len(videos) <= _MOST_IN_A_ROW else square
    columns = min(usual if columns is None else checked_int("columns", columns), len(videos))
    steps = {name: _step(frames, fps) for name, frames in videos.items()}
    counts = [math.ceil(len(frames) / steps[name] - 1e-6) for name, frames in videos.items()]
    length = max(counts) if until == "longest" else min(counts)
    return [
        _page({name: _frame_at(frames, t * steps[name]) for name, frames in videos.items()}, columns, height)
        for t in range(length)
    ]


def common_rate(videos: Videos) -> float:
    """The frame rate at which no frame of the videos is left out: the highest of those that say theirs;
    15 if none does.
    """
    return max((frames.fps for frames in videos.values() if _has_rate(frames)), default=USUAL_FPS)


def _has_rate(frames: VideoData | Frames) -> bool:
    return isinstance(frames, VideoData) and bool(frames.fps)


def _step(frames: VideoData | Frames, fps: float | None) -> float:
    """Frames of this video for one frame of the grid."""
    return frames.fps / fps if fps is not None and _has_rate(frames) else 1.0


def _frame_at(frames: VideoData | Frames, place: float) -> Image.Image:
    frame = frames[min(int(place + 1e-6), len(frames) - 1)]
    return next(rgb_frames([frame]))


def _page(frames: dict[str, Image.Image], columns: int, height: int) -> Image.Image:
    """One frame of the grid; its sides are even, so that any player shows it."""
    names, pictures = list(frames), list(frames.values())
    widths = [max(1, round(frame.width * height / frame.height)) for frame in pictures]
    column_widths = [max(widths[column::columns]) for column in range(columns)]
    lefts = [0, *np.cumsum([width + GAP for width in column_widths]).tolist()]
    row_height = LABEL_HEIGHT + height + GAP
    rows = math.ceil(len(pictures) / columns)
    size = (lefts[-1] - GAP, rows * row_height - GAP)
    page = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), PAPER)
    draw, font = ImageDraw.Draw(page), text_font()
    for index, (name, frame, width) in enumerate(zip(names, pictures, widths, strict=True)):
        row, column = divmod(index, columns)
        left, top, room = lefts[column], row * row_height, column_widths[column]
        page.paste(fit_frame(frame, height, width), (left + (room - width) // 2, top + LABEL_HEIGHT))
        text = fitted_text(name, font, room)
        draw.text((left + room / 2, top + LABEL_HEIGHT / 2), text, INK, font=font, anchor="mm")
    return page
