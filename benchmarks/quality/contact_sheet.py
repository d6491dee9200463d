"""Videos as pictures: a strip of all frames, to keep, and a sheet that compares videos at a glance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffsynth.evaluation.tracking import Frames, video_array

TITLES = ("reference", "no transfer", "transferred")
FONT_SIZE = 15
_LINE = 22  # pixels for a line of text
_GAP, _WIDE_GAP = 3, 18
_PAPER, _INK = (255, 255, 255), (30, 30, 30)


def save_strip(frames: Frames, path: str | Path) -> Path:
    """Write all frames side by side as one PNG; the folder is made if need be. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(video_array(frames)), axis=1)).save(path)
    return path


def load_strip(path: str | Path, num_frames: int) -> np.ndarray:
    """The frames of a strip, uint8 [T, H, W, 3]. Raises ValueError if its width is not num_frames frames."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape[1] % num_frames:
        raise ValueError(f"{path} is {pixels.shape[1]} pixels wide, which is not {num_frames} frames")
    return np.stack(np.split(pixels, num_frames, axis=1))


def contact_sheet(
    videos: Sequence[Sequence[Frames]],
    captions: Sequence[str],
    titles: Sequence[str] = TITLES,
    *,
    num_shown: int = 5,
    scale: int = 2,
) -> Image.Image:
    """One row a pair, one column a video: `num_shown` frames of each, from the first to the last.

    videos: rows of as many videos as there are titles, all frames of one size. captions: a line of text
    above each row. scale: whole factor by which frames are enlarged.
    Raises ValueError for rows, captions and titles that do not fit each other, and for no rows.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"videos and captions must be as many, and some; got {len(videos)} and {len(captions)}"
        )
    if any(len(row) != len(titles) for row in videos):
        raise ValueError(
            f"each row of videos must have {len(titles)}, as titles; got {[len(row) for row in videos]}"
        )
    rows = [[_shown(video, num_shown, scale) for video in row] for row in videos]
    height, width = rows[0][0].shape[:2]
    row_height = _LINE + height + _GAP
    sheet = Image.new(
        "RGB",
        (len(titles) * (width + _WIDE_GAP) + _WIDE_GAP, _LINE + len(rows) * row_height + _GAP),
        _PAPER,
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    lefts = [_WIDE_GAP + column * (width + _WIDE_GAP) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, 3), title, _INK, font=font)
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = _LINE + number * row_height
        draw.text((_WIDE_GAP, top + 2), caption, _INK, font=font)
        for left, picture in zip(lefts, row, strict=True):
            sheet.paste(Image.fromarray(picture), (left, top + _LINE))
    return sheet


def _shown(video: Frames, num_shown: int, scale: int) -> np.ndarray:
    """Some frames side by side, enlarged, with gaps between them: uint8 [H, W, 3]."""
    frames = video_array(video)
    chosen = frames[np.linspace(0, len(frames) - 1, num_shown).round().astype(int)]
    large = chosen.repeat(scale, axis=1).repeat(scale, axis=2)
    gap = np.full((large.shape[1], _GAP, 3), _PAPER, np.uint8)
    pieces = [piece for frame in large for piece in (frame, gap)]
    return np.concatenate(pieces[:-1], axis=1)
