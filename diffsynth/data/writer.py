"""Write finished frames: save_video to one video file, save_frames to a folder of PNG files.

Both write beside the target first and move into place at the end, so that neither an error nor a kill leaves
a broken file where a good one was.
"""

import logging
import subprocess
import traceback
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from fractions import Fraction
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffsynth.data.ffmpeg import file_url, reported, run_ffmpeg
from diffsynth.data.files import written_whole
from diffsynth.data.frames import is_number, rgb_frames, write_pngs
from diffsynth.data.stream import EXACT_SCALING, probe_video

logger = logging.getLogger(__name__)

QUICKTIME = (".mp4", ".m4v", ".mov")
VIDEO_SUFFIXES = (*QUICKTIME, ".mkv", ".avi", ".webm", ".gif")
DEFAULT_FPS = 15.0
LOSSLESS_SUFFIXES = (".mkv", ".avi", ".webm")
# setparams as well as the options: ffmpeg 7 and newer take tags from the frames. Players ignore half a tag.
_TO_BT709 = (
    f"scale=out_color_matrix=bt709:out_range=tv:{EXACT_SCALING},"
    "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
)
_BT709 = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
_SOUND_CODECS = {**dict.fromkeys((*QUICKTIME, ".mkv"), "aac"), ".avi": "libmp3lame", ".webm": "libopus"}
_GIF_PALETTE = "split[a][b];[a]palettegen=stats_mode=full[p];[b][p]paletteuse=dither=sierra2_4a"


def save_video(
    frames: Iterable[Image.Image | np.ndarray] | np.ndarray,
    path: str | PathLike | None = None,
    fps: float | None = DEFAULT_FPS,
    quality: float = 5,
    ffmpeg_params: Sequence[str] | None = None,
    *,
    lossless: bool = False,
    audio_from: str | PathLike | None = None,
    audio_start: float = 0.0,
    save_path: str | PathLike | None = None,
) -> Path:
    """Encode frames as a video, at exactly their size.

    The suffix decides the codec: H.264 for .mp4, .m4v, .mov, .mkv and .avi, VP9 for .webm, or a .gif. Colours
    are converted by ITU-R BT.709, and the file has its tags; players assume BT.709 for untagged video too.
    Frames of odd height or width are stored as 4:4:4 (4:2:0 has even sizes only), which some players refuse.

    An existing file is replaced, but only once the new one is complete and checked to hold as many frames of
    the same size; on an error it stays as it was. What a killed process leaves beside it, a hidden file
    `.writing-*`, is removed when the same file is written again.

    Args:
        frames: PIL images (any mode, converted to RGB) or uint8 arrays [H, W, 3], also from a generator, read
            frame by frame; or one uint8 array [T, H, W, 3]. They have one size.
        path: the file; missing parent folders are made.
        fps: frames a second, above 0; None for 15.
        quality: 0 (smallest file) to 10 (best): the constant rate factor 51 to 1 of x264, 63 to 1 of VP9.
        ffmpeg_params: further output options for ffmpeg, which take precedence.
        lossless: keep pixels bit-identical: FFV1 in .mkv and .avi, lossless VP9 in .webm.
        audio_from: video or audio file whose sound is kept, if it has any, up to the last frame.
        audio_start: second of that sound at which the frames begin.
        save_path: DiffSynth-Studio's name for path.

    Returns:
        The path.

    Raises:
        ValueError, TypeError: an argument or a frame is not allowed (see `rgb_frames`).
        RuntimeError: ffmpeg failed, or the file does not hold the frames.
        OSError: the disk is full, or the folder cannot be written to.
    """
    name = path if save_path is None else save_path
    if name is None or (path is not None and save_path is not None):
        raise TypeError("save_video needs one path: save_video(frames, 'out.mp4')")
    asked = Path(name)
    # A link stays a link: what it points to is replaced.
    target = asked.resolve()
    fps = DEFAULT_FPS if fps is None else fps
    encoding = _encoding(target, fps, quality, lossless)
    params = [] if ffmpeg_params is None else ffmpeg_params
    if isinstance(params, str) or not all(isinstance(word, str) for word in params):
        raise TypeError(f"ffmpeg_params must be a list of strings as ['-preset', 'slow'], got {params!r}")
    images = rgb_frames(frames)
    first = next(images)
    if (first.width % 2 or first.height % 2) and encoding["pixelformat"] == "yuv420p":
        logger.info("%dx%d is an odd size: stored as 4:4:4, which some players refuse", *first.size)
        encoding["pixelformat"] = "yuv444p"
    if audio_from is not None:
        rest = list(images)  # the sound is cut to their number
        images = iter(rest)
        _add_sound(encoding, target, Path(audio_from), audio_start, (1 + len(rest)) / fps)
    encoding["output_params"] += params
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as temporary:
        num_frames, problem = _encode(chain([first], images), temporary, encoding)
        try:
            written = probe_video(temporary)
        except (ValueError, FileNotFoundError) as error:
            raise RuntimeError(f"{asked}: ffmpeg could not write the video: {problem or error}") from error
        found = (len(written.times), *written.size)
        if found != (num_frames, *first.size):
            message = "{} was not written: the encoded video has {} frames of {}x{}, asked were {} of {}x{}"
            raise RuntimeError(message.format(asked, *found, num_frames, *first.size))
    return asked


def save_frames(frames: Iterable[Image.Image | np.ndarray] | np.ndarray, folder: str | PathLike) -> Path:
    """Write frames to a folder as 00000.png, 00001.png, ...

    They appear together at the end, so that an error leaves none behind. Nothing is overwritten, and other
    files in the folder stay.

    Args:
        frames: as for `save_video`.
        folder: made if missing.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds images, or is a file.
        ValueError, TypeError: a frame is not allowed (see `rgb_frames`).
    """
    folder = Path(folder)
    write_pngs(rgb_frames(frames), folder, digits=5)
    return folder


def _encoding(target: Path, fps: float, quality: float, lossless: bool) -> dict[str, Any]:
    """Return the arguments of imageio's FFMPEG writer."""
    suffix = target.suffix.lower()
    if suffix not in VIDEO_SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(VIDEO_SUFFIXES)}, got {target.name!r}")
    if lossless and suffix not in LOSSLESS_SUFFIXES:
        allowed = ", ".join(LOSSLESS_SUFFIXES)
        raise ValueError(f"lossless video needs a path that ends in one of {allowed}, got {target.name!r}")
    if target.is_dir():
        raise ValueError(f"path {target} is a folder, give the name of a video file")
    if not is_number(fps) or not 1e-4 <= fps <= 1e5:
        raise ValueError(f"fps must be a number above 0 (at most 100000), got {fps!r}")
    if not is_number(quality) or not 0 <= quality <= 10:
        raise ValueError(f"quality must be a number from 0 to 10, got {quality!r}")
    worst = 63 if suffix == ".webm" else 51
    # Rate factor 0 of x264 would switch to its lossless profile, which hardly any player knows.
    rate_factor = str(max(1, int((1 - quality / 10) * worst)))
    if suffix == ".gif":
        codec, pixel_format, options = "gif", "pal8", ["-filter_complex", _GIF_PALETTE]
    elif suffix == ".webm" and lossless:
        codec, pixel_format, options = "libvpx-vp9", "gbrp", ["-lossless", "1"]
    elif lossless:
        codec, pixel_format, options = "ffv1", "bgr0", []
    else:
        codec, pixel_format = ("libvpx-vp9" if suffix == ".webm" else "libx264"), "yuv420p"
        options = ["-vf", _TO_BT709, *_BT709, "-crf", rate_factor]
    if codec == "libvpx-vp9":
        options += ["-b:v", "0", "-cpu-used", "4", "-row-mt", "1"]
    if suffix in QUICKTIME:
        options += ["-movflags", "+faststart"]
    # Read as a fraction: 29.97... frames a second are 30000/1001.
    rate = str(Fraction(float(fps)).limit_denominator(100_000))
    return {
        "codec": codec,
        "pixelformat": pixel_format,
        "macro_block_size": 1,  # imageio would resize frames to multiples of 16
        "input_params": ["-r", rate],
        "output_params": options,
        "ffmpeg_log_level": "quiet",
    }


def _add_sound(encoding: dict[str, Any], target: Path, source: Path, start: float, duration: float) -> None:
    """Add the sound of a file from a second on to the arguments of the writer, with silence after its end."""
    if not source.is_file():
        raise FileNotFoundError(f"audio_from {source} does not exist")
    codec = _SOUND_CODECS.get(target.suffix.lower())
    if codec is None:
        raise ValueError(f"a {target.suffix} file has no sound: leave out audio_from or take another suffix")
    if "Audio:" not in run_ffmpeg(["-i", file_url(source)])[1]:
        logger.info("%s has no sound to keep", source)
        return
    cut = f"atrim=start={float(start)}:duration={duration},asetpts=PTS-STARTPTS,apad=whole_dur={duration}"
    encoding.update(audio_path=file_url(source), audio_codec=codec)
    encoding["output_params"] += ["-af", cut]


def _encode(images: Iterable[Image.Image], path: Path, encoding: dict[str, Any]) -> tuple[int, str]:
    """Write the frames, and return their number and the errors of ffmpeg."""
    import imageio.v3 as iio

    num_frames = 0
    with reported() as (complaints, starting):
        # The name ends in the suffix that ffmpeg goes by; imageio knows only some of them.
        opened: Any = iio.imopen(path, "w", plugin="FFMPEG", extension=".mp4", legacy_mode=True)
        with opened as file, closing(file.legacy_get_writer(**encoding)) as writer:
            for image in images:
                try:
                    with starting() if num_frames == 0 else nullcontext():
                        writer.append_data(np.asarray(image))
                except OSError as error:  # ffmpeg has ended early
                    problem = complaints() or _ended(error)
                    raise RuntimeError(f"ffmpeg could not write the video: {problem}") from error
                num_frames += 1
        return num_frames, complaints()


def _ended(error: OSError) -> str:
    """Return how the process ended that imageio was writing to when this error arose."""
    seen = [value for frame, _ in traceback.walk_tb(error.__traceback__) for value in frame.f_locals.values()]
    status = next((value.returncode for value in seen if isinstance(value, subprocess.Popen)), None)
    return f"it was killed by signal {-status}" if status and status < 0 else f"its exit status is {status}"
