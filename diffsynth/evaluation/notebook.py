"""Videos inside a notebook."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffsynth.data import VideoData, save_video
from diffsynth.data.writer import DEFAULT_FPS

if TYPE_CHECKING:
    import IPython.display


def display(
    video: VideoData | Sequence[Image.Image] | np.ndarray | str | Path,
    fps: float | None = None,
    width: int | None = 480,
) -> "IPython.display.Video":
    """Return a video for a notebook to show, stored inside the notebook: `diffsynth.display(frames)`.

    Args:
        video: a `VideoData`, PIL images, uint8 [F, H, W, 3], or a path of an mp4.
        fps: the video's own by default, else 15.
        width: width in pixels on the page; None for the video's own.

    Raises:
        ImportError: IPython is not installed.
        What `save_video` raises for what is no video.
    """
    try:
        from IPython.display import Video
    except ImportError as error:
        text = "display shows videos in notebooks and needs IPython: pip install ipython"
        raise ImportError(text) from error
    how = {"embed": True, "width": width, "html_attributes": "controls loop autoplay muted"}
    if isinstance(video, str | Path):
        return Video(str(video), **how)
    rate = fps or getattr(video, "fps", None) or DEFAULT_FPS
    with tempfile.TemporaryDirectory() as folder:
        path = save_video(video, Path(folder, "video.mp4"), fps=rate, quality=8)
        return Video(data=path.read_bytes(), mimetype="video/mp4", **how)
