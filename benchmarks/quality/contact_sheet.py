"""Videos as pictures: a strip of all frames, to keep, and a sheet that compares videos at a glance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffsynth.data.tensors import Video
from diffsynth.evaluation.grid import picture_grid
from diffsynth.evaluation.tracking import video_array

TITLES = ("reference", "no transfer", "transferred")
_GAP = 3  # pixels between frames


def save_strip(frames: Video, path: str | Path) -> Path:
    """Write all frames side by side as one PNG and return its path; the folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(video_array(frames)), axis=1)).save(path)
    return path


def load_strip(path: str | Path, num_frames: int) -> np.ndarray:
    """Read the frames of a strip, uint8 [T, H, W, 3].

    Raises:
        ValueError: the strip's width is not num_frames frames.
    """
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape[1] % num_frames:
        raise ValueError(f"{path} is {pixels.shape[1]} pixels wide, which is not {num_frames} frames")
    return np.stack(np.split(pixels, num_frames, axis=1))


def contact_sheet(
    videos: Sequence[Sequence[Video]],
    captions: Sequence[str],
    titles: Sequence[str] = TITLES,
    *,
    num_shown: int = 5,
    scale: int = 2,
) -> Image.Image:
    """Draw a row for each pair and a column for each video, with some frames of each.

    Args:
        videos: rows of as many videos as there are titles.
        captions: a line of text above each row.
        titles: of the columns.
        num_shown: frames of each video, from the first to the last.
        scale: whole factor by which frames are enlarged.

    Raises:
        ValueError: rows, captions and titles do not fit each other, or there are no rows.
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
    return picture_grid(rows, labels=[titles], captions=captions)


def _shown(video: Video, num_shown: int, scale: int) -> Image.Image:
    """Return some frames side by side, enlarged, with gaps between them."""
    frames = video_array(video)
    chosen = frames[np.linspace(0, len(frames) - 1, num_shown).round().astype(int)]
    large = chosen.repeat(scale, axis=1).repeat(scale, axis=2)
    gaps = np.pad(large, ((0, 0), (0, 0), (0, _GAP), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(gaps), axis=1)[:, :-_GAP])
