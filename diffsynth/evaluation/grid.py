"""The grid of every contact sheet: pictures in rows and columns with labels, and videos shown that way."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest

from PIL import Image, ImageDraw

from diffsynth.data import VideoData, fit_frame
from diffsynth.data.frames import checked_int, rgb_frames
from diffsynth.data.tensors import Video
from diffsynth.evaluation.drawing import INK, PAPER, text_font

LABEL_HEIGHT = 24  # pixels of a line of text
GAP = 4  # pixels between pictures
ENDS = ("shortest", "longest")
_MOST_IN_A_ROW = 3  # videos, unless columns are asked for


def picture_grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[Sequence[str]] = (), captions: Sequence[str] = ()
) -> Image.Image:
    """Lay out pictures of any sizes in rows and columns, each in the middle of its column.

    `labels[r]` are the texts above the pictures of row r, `captions[r]` is the text above the row; both may
    cover only the first rows. Long texts are cut. The sheet has even sides, which video players require.
    """
    widths = [max(picture.width for picture in column if picture) for column in zip_longest(*rows)]
    lefts = list(accumulate((width + GAP for width in widths), initial=0))
    heights = [max(picture.height for picture in row) for row in rows]
    width = lefts[-1] - GAP
    height = sum(heights) + GAP * (len(rows) - 1) + LABEL_HEIGHT * (len(labels) + len(captions))
    sheet = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
    draw, top = ImageDraw.Draw(sheet), 0
    for row, row_height, texts, caption in zip_longest(rows, heights, labels, captions):
        if caption is not None:
            draw.text((GAP, top + LABEL_HEIGHT / 2), _fitted(caption, width), INK, text_font(), "lm")
            top += LABEL_HEIGHT
        if texts is not None:
            for left, room, text in zip(lefts, widths, texts, strict=False):
                middle = (left + room / 2, top + LABEL_HEIGHT / 2)
                draw.text(middle, _fitted(text, room), INK, text_font(), "mm")
            top += LABEL_HEIGHT
        for left, room, picture in zip(lefts, widths, row, strict=False):
            sheet.paste(picture, (left + (room - picture.width) // 2, top))
        top += row_height + GAP
    return sheet


def _fitted(text: str, width: float) -> str:
    """Return the text, cut short with dots at its end if it is wider than `width` pixels."""
    cuts = (text, *(text[:kept].rstrip() + "..." for kept in range(len(text) - 1, -1, -1)))
    return next((cut for cut in cuts if text_font().getlength(cut) <= width), "")


def side_by_side(videos: Mapping[str, Video], height: int = 256) -> list[Image.Image]:
    """Show videos in one row, each under its name, for as many frames as the shortest has.

    Args:
        videos: the videos by name.
        height: height of each video in pixels.

    Raises:
        ValueError: there is no video, or one has no frames.
    """
    return video_grid(videos, columns=max(len(videos), 1), height=height)


def video_grid(
    videos: Mapping[str, Video],
    *,
    columns: int | None = None,
    height: int = 256,
    until: str = "shortest",
    fps: float | None = None,
) -> list[Image.Image]:
    """Show videos of any sizes in rows and columns, each under its name.

    Args:
        videos: the videos by name.
        columns: videos in a row; by default up to three videos make one row, more make about a square.
        height: height of each video in pixels.
        until: whether the "shortest" or the "longest" video ends it; others then stay at their last frame.
        fps: frame rate of the result, at which a VideoData is shown at its own speed and other videos frame
            by frame; None shows all of them frame by frame.

    Raises:
        ValueError: there is no video, one has no frames, or another argument is out of range.
    """
    if not videos or not all(len(frames) for frames in videos.values()):
        lengths = {name: len(frames) for name, frames in videos.items()}
        raise ValueError(f"videos must be one or more, each with frames; got {lengths}")
    if until not in ENDS:
        raise ValueError(f"until must be one of {', '.join(ENDS)}; got {until!r}")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps must be a number above 0; got {fps!r}")
    height = checked_int("height", height)
    if columns is None:
        columns = len(videos) if len(videos) <= _MOST_IN_A_ROW else math.ceil(math.sqrt(len(videos)))
    columns = min(checked_int("columns", columns), len(videos))
    rates = [frames.fps if isinstance(frames, VideoData) else None for frames in videos.values()]
    steps = [rate / fps if fps and rate else 1.0 for rate in rates]
    counts = [math.ceil(len(v) / step - 1e-6) for v, step in zip(videos.values(), steps, strict=True)]
    names = list(videos)
    labels = [names[first : first + columns] for first in range(0, len(names), columns)]
    sheets = []
    for t in range(max(counts) if until == "longest" else min(counts)):
        now = zip(videos.values(), steps, strict=True)
        cells = [_cell(frames, int(t * step + 1e-6), height) for frames, step in now]
        rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
        sheets.append(picture_grid(rows, labels))
    return sheets


def _cell(frames: Video, index: int, height: int) -> Image.Image:
    """Return frame `index`, or the last one, `height` pixels high."""
    frame = next(rgb_frames([frames[min(index, len(frames) - 1)]]))
    return fit_frame(frame, height, max(1, round(frame.width * height / frame.height)))
