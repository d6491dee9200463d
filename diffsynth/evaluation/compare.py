"""Videos beside each other, with their names."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from diffsynth.data import fit_frame

LABEL_HEIGHT = 24  # pixels
GAP = 4


def side_by_side(videos: Mapping[str, Sequence[Image.Image]], height: int = 256) -> list[Image.Image]:
    """Frames that show all videos in a row, each `height` pixels high under its name.

    As many frames as the shortest video has. Raises ValueError if there is no video or one has no frames.
    """
    if not videos or not all(len(frames) for frames in videos.values()):
        lengths = {name: len(frames) for name, frames in videos.items()}
        raise ValueError(f"videos must be one or more, each with frames; got {lengths}")
    shortest = min(map(len, videos.values()))
    return [_row({name: frames[t] for name, frames in videos.items()}, height) for t in range(shortest)]


def _row(frames: dict[str, Image.Image], height: int) -> Image.Image:
    widths = [round(frame.width * height / frame.height) for frame in frames.values()]
    row = Image.new("RGB", (sum(widths) + GAP * (len(widths) - 1), height + LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(row)
    left = 0
    for (name, frame), width in zip(frames.items(), widths, strict=True):
        row.paste(fit_frame(frame, height, width), (left, LABEL_HEIGHT))
        draw.text((left + width / 2, LABEL_HEIGHT / 2), name, fill="black", anchor="mm")
        left += width + GAP
    return row
