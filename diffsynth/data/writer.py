"""Write finished frames: save_video to one video file, save_frames to a folder of PNG files.

Both write beside the target first and move into place at the end, so that neither an error nor a kill leaves
a broken file where a good one was.
"""

import logging
import math
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from numbers import Real
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image

from diffsynth.data.frames import rgb_frames, write_pngs
from diffsynth.data.video import probe_video

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi")
FASTSTART_SUFFIXES = (".mp4", ".m4v", ".mov")
WORST_CRF = 51


def save_video(
    frames: Iterable[Image.Image | np.ndarray] | np.ndarray,
    path: str | PathLike,
    fps: float = 15,
    quality: float = 5,
    ffmpeg_params: Sequence[str] | None = None,
) -> Path:
    """Encode frames as H.264 video, at exactly their size, and return the path.

    An existing file is replaced, but only once the new one is complete and checked to decode to as many
    frames of the same size; on an error it stays as it was. A killed process may leave a hidden `.saving-*`
    file beside it. Frames of odd height or width are stored as 4:4:4 (4:2:0 has even sizes only), which some
    players refuse.

    Args:
        frames: PIL images (any mode, converted to RGB) or uint8 arrays [H, W, 3], also from a generator, read
            frame by frame; or one uint8 array [T, H, W, 3]. All of one size.
        path: ends in .mp4, .m4v, .mov, .mkv or .avi; missing parent folders are made.
        fps: frames per second, above 0.
        quality: 0 (smallest file) to 10 (best), the constant rate factor 51 to 1 of x264.
        ffmpeg_params: further output options for ffmpeg; they come last and so win over ours.

    Raises:
        ValueError, TypeError: an argument or a frame is not as above (see `rgb_frames`).
        RuntimeError: ffmpeg failed, or the file does not hold the frames that were asked for.
    """
    path = Path(path)
    # A link stays a link: what it points to is replaced.
    target = path.resolve()
    options = [*_output_options(target, fps, quality), *_checked_params(ffmpeg_params)]
    images = rgb_frames(frames)
    first = next(images)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".saving-{uuid.uuid4().hex}{target.suffix}")
    rate = str(Fraction(float(fps)).limit_denominator(100_000))
    try:
        num_frames = _encode(first, images, temporary, rate, options)
        _check_written(temporary, num_frames, first.size, path)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def save_frames(frames: Iterable[Image.Image | np.ndarray] | np.ndarray, folder: str | PathLike) -> Path:
    """Write frames to folder (made if missing) as 00000.png, 00001.png, ... and return the folder.

    Never overwrites: a folder that holds images already is refused, other files in it stay. The frames appear
    together at the end, so an error on the way leaves none. frames as in `save_video`.

    Raises:
        FileExistsError: the folder holds images, or is a file.
        ValueError, TypeError: a frame is not as asked (see `rgb_frames`).
    """
    folder = Path(folder)
    write_pngs(rgb_frames(frames), folder, digits=5)
    return folder


def _output_options(target: Path, fps: float, quality: float) -> list[str]:
    if target.suffix.lower() not in VIDEO_SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(VIDEO_SUFFIXES)}, got {target.name!r}")
    if target.is_dir():
        raise ValueError(f"path {target} is a folder, give the name of a video file")
    if not _is_number(fps) or not 1e-4 <= fps <= 1e5:
        raise ValueError(f"fps must be a number above 0 (at most 100000), got {fps!r}")
    if not _is_number(quality) or not 0 <= quality <= 10:
        raise ValueError(f"quality must be a number from 0 to 10, got {quality!r}")
    # Rate factor 0 would switch to the lossless profile, which hardly any player knows.
    rate_factor = max(1, int((1 - quality / 10) * WORST_CRF))
    options = ["-an", "-c:v", "libx264", "-crf", str(rate_factor)]
    return [*options, "-movflags", "+faststart"] if target.suffix.lower() in FASTSTART_SUFFIXES else options


def _is_number(value: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _checked_params(params: Sequence[str] | None) -> list[str]:
    if params is None:
        return []
    if isinstance(params, str) or not all(isinstance(word, str) for word in params):
        raise TypeError(
            f"ffmpeg_params must be a list of strings such as ['-preset', 'slow'], got {params!r}"
        )
    return list(params)


def _encode(
    first: Image.Image, rest: Iterator[Image.Image], path: Path, rate: str, options: list[str]
) -> int:
    """Pipe the frames into ffmpeg and return how many there were; RuntimeError with its words if it fails."""
    from imageio_ffmpeg import get_ffmpeg_exe

    width, height = first.size
    odd = width % 2 or height % 2
    if odd:
        logger.info("%dx%d is an odd size: stored as 4:4:4, which some players cannot show", width, height)
    command = [get_ffmpeg_exe(), "-y", "-hide_banner", "-loglevel", "error", "-f", "rawvideo"]
    command += ["-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "pipe:0"]
    command += ["-pix_fmt", "yuv444p" if odd else "yuv420p", *options, f"file:{path}"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
        try:
            num_frames = _feed(process, first, rest)
            process.wait()
        finally:
            # Reached with a live process only when a frame raised: the file is given up.
            process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            words = log.read().decode(errors="replace").strip()
            raise RuntimeError(
                f"ffmpeg could not write the video (exit status {process.returncode}): {words}"
            )
    return num_frames


def _feed(process: subprocess.Popen, first: Image.Image, rest: Iterator[Image.Image]) -> int:
    num_frames = 0
    image = first
    # A closed pipe means that ffmpeg ended early: its exit status and words tell why, not the pipe.
    while image is not None:
        try:
            process.stdin.write(image.tobytes())
        except BrokenPipeError:
            return num_frames
        num_frames += 1
        image = next(rest, None)
    with suppress(BrokenPipeError):
        process.stdin.close()
    return num_frames


def _check_written(temporary: Path, num_frames: int, size: tuple[int, int], path: Path) -> None:
    try:
        written = probe_video(temporary)
    except (ValueError, FileNotFoundError) as error:
        raise RuntimeError(f"{path} was not written: ffmpeg made no readable video ({error})") from error
    if (written.num_frames, written.size) != (num_frames, size):
        raise RuntimeError(
            f"{path} was not written: the encoded video has {written.num_frames} frames of "
            f"{written.size[0]}x{written.size[1]}, asked were {num_frames} of {size[0]}x{size[1]}"
        )
