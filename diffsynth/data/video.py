"""Reference videos: VideoData gives the frames of a video file or an image folder as PIL images."""

import logging
import operator
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
from PIL import Image

from diffsynth.data.ffmpeg import reported
from diffsynth.data.frames import (
    FITS,
    ImageFolder,
    checked_int,
    fit_frame,
    is_number,
    warn_of_cropping,
    write_pngs,
)
from diffsynth.data.stream import EVERY_FRAME_ONCE, EXACT_SCALING, VIDEO_STREAM, probe_video

logger = logging.getLogger(__name__)

TICK = 1e-4  # tolerance for rounded frame times, in seconds
LONGEST_START = 10.0  # seconds that imageio waits for ffmpeg's first frame
Frames = Generator[Image.Image, None, None]


class VideoFile:
    """Frames of a video file, or of a part of it.

    A file of constant rate is read frame by frame, without doubling or dropping any; one of variable rate is
    resampled to its mean rate, so that motion keeps its speed. One decoder stays open between calls of
    `frame` and only moves forward; a request for an earlier frame restarts it.

    Args:
        path: path of the file.
        fps: frames a second to read the file at; None for the file's rate.
        start: time in seconds of the first frame to read.
        end: time in seconds at which reading stops; None for the end of the file.

    Raises:
        ValueError, FileNotFoundError: see `probe_video`; ValueError also if no frame lies from start to end.
    """

    def __init__(
        self, path: Path, fps: float | None = None, start: float = 0.0, end: float | None = None
    ) -> None:
        stream = probe_video(path)
        if stream.error is not None:
            message = "%s is damaged: %d frames decode, its header promises about %d (%s)"
            logger.warning(message, path, len(stream.times), stream.promised, stream.error)
        stop = stream.end if end is None else min(end, stream.end)
        inside = np.flatnonzero((stream.times >= start - TICK) & (stream.times < stop - TICK))
        if len(inside) == 0:
            raise ValueError(f"no frame of {path} lies from {start=} to {end=}; it lasts {stream.end:g} s")
        self._path, self._size, self._num_frames = path, stream.size, len(inside)
        self.fps = stream.rate if fps is None else Fraction(float(fps)).limit_denominator(100_000)
        notes, filters = list(stream.notes), list(stream.filters)
        if stream.variable or self.fps != stream.rate:
            self._num_frames = max(1, round((stop - stream.times[inside[0]]) * float(self.fps)))
            # If rounding drops the last frame, the one before it is repeated.
            filters += [f"fps={self.fps}", "tpad=stop=2:stop_mode=clone"]
            told = "a variable rate" if stream.variable else f"{float(stream.rate):g} frames a second"
            notes.append(f"{told}, read at {float(self.fps):g}")
        width, height = stream.size
        # Planar RGB first: exact conversion straight to packed pixels gives the same but takes twice as long.
        filters += [f"scale={width}:{height}:{EXACT_SCALING}", "format=gbrp", "format=rgb24"]
        self._input_params = list(stream.decoder)
        if inside[0] > 0 and not stream.seeks:
            filters.insert(0, f"trim=start_frame={inside[0]}")
        elif inside[0] > 0:
            # Seek to halfway between two frames, so that rounding cannot pick the wrong one.
            between = (stream.times[inside[0] - 1] + stream.times[inside[0]]) / 2
            self._input_params += ["-ss", f"{between:.6f}"]
        self._output_params = [*VIDEO_STREAM, *EVERY_FRAME_ONCE, "-vf", ",".join(filters)]
        self._decoder: Frames | None = None
        self._position = 0
        self._last: Image.Image | None = None
        logger.info("%s: %s", path.name, "; ".join(notes) or "read as it is")

    def __len__(self) -> int:
        return self._num_frames

    def common_size(self) -> tuple[int, int]:
        """Return (width, height) of the frames."""
        return self._size

    def frame(self, index: int) -> Image.Image:
        """Return a copy of the frame at 0 <= index < len, upright and RGB, which the caller may draw on."""
        if self._last is None or index != self._position - 1:
            if self._decoder is None or index < self._position:
                self.close()
                self._decoder = self.stream()
                self._position = 0
            while self._position <= index:
                try:
                    self._last = next(self._decoder)
                except ValueError:
                    self.close()
                    raise
                self._position += 1
        assert self._last is not None  # a stream yields every frame, or raises
        return self._last.copy()

    def stream(self) -> Frames:
        """Return a generator of all frames in order, with a separate decoder."""
        return _decode(self._path, self._num_frames, self._input_params, self._output_params)

    def close(self) -> None:
        """Stop the decoder, but keep the last frame."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


def _decode(path: Path, num_frames: int, input_params: list[str], output_params: list[str]) -> Frames:
    """Yield num_frames frames of a file; raise ValueError if fewer decode."""
    import imageio.v3 as iio

    options: Any = {"input_params": input_params, "output_params": output_params}
    first, index, slow, begun = None, 0, False, time.monotonic()
    with reported() as (complaints, starting):
        with starting():
            frames: Any = iio.imiter(path.absolute(), plugin="FFMPEG", extension=".mp4", **options)
            try:
                first = next(frames, None)
            except (OSError, RuntimeError) as error:
                logger.debug("%s: %s", path, error)
                slow = time.monotonic() - begun >= LONGEST_START
        with closing(frames):
            while first is not None and index < num_frames:
                yield Image.fromarray(first)
                index += 1
                first = next(frames, None) if index < num_frames else None
        problem = complaints().split("\n")[0]
    if slow and not problem:
        raise ValueError(
            f"{path}: the first frame takes more than {LONGEST_START:g} s, since no keyframe is "
            "near it; cut the file there, or give an earlier start"
        )
    if index < num_frames:
        raise ValueError(
            f"{path} is damaged or has changed: {index} frames decode, {num_frames} when it was opened "
            f"({problem or 'ffmpeg reports no error'}); set end or num_frames to use fewer"
        )
    if problem.startswith("["):  # ffmpeg starts an error with its component in brackets
        logger.warning("%s is damaged, and some of its frames may look wrong: %s", path, problem)


class VideoData:
    """Frames of a video file or of a folder of images, as upright PIL images of mode RGB.

    It behaves as a sequence: `len`, `video[i]` (negative too), `video[a:b]` (a list), iteration. Frames are
    read on access; reading forward decodes each frame once, and iteration holds one at a time. Opening reads
    the frames' times without decoding; only a damaged file is decoded on opening, which uses the frames that
    decode and logs a warning. The decoder is freed after the last frame, by `close()`, at the end of a `with`
    block, or with the object.

    Frames are upright and have square pixels; interlaced video is deinterlaced, HDR is tone-mapped,
    transparent pixels are laid on black, and a variable rate is read at its mean. Each conversion is logged.

    Args:
        video_file: path of a video; exactly one of video_file and image_folder is required.
        image_folder: path of a folder of png, jpg, jpeg, webp, bmp files, in natural order (2 before 10).
        height: height of the frames in pixels; give both height and width, or neither.
        width: width of the frames in pixels.
        fps: frames a second at which a video file is read, at unchanged speed; None for the rate of the file.
        start: time in seconds at which reading begins.
        end: time in seconds at which reading stops; None for the end of the video.
        fit: how frames are brought to height and width: "crop", "pad" or "stretch" (see `fit_frame`).

    Raises:
        FileNotFoundError: the file or folder does not exist.
        TypeError: a path is neither str nor PathLike.
        ValueError: arguments contradict each other, the file is damaged or not a video, the folder holds no
            images, or its images differ in size while height and width are not given.
    """

    def __init__(
        self,
        video_file: str | PathLike | None = None,
        image_folder: str | PathLike | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        fps: float | None = None,
        start: float | None = None,
        end: float | None = None,
        fit: str = "crop",
    ) -> None:
        if (video_file is None) == (image_folder is None):
            raise ValueError(
                f"give one of video_file and image_folder, got {video_file!r} and {image_folder!r}"
            )
        if (height is None) != (width is None):
            raise ValueError(f"give both height and width or neither, got height={height!r}, width={width!r}")
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
        shape = None
        if height is not None and width is not None:
            shape = checked_int("height", height), checked_int("width", width)
        part = {"fps": fps, "start": start, "end": end}
        for name, value in part.items():
            if value is not None and not (is_number(value) and value >= 0 and (value > 0 or name == "start")):
                allowed = "0 or more seconds" if name == "start" else "above 0"
                raise ValueError(f"{name} must be a number, {allowed}, got {value!r}")
        self._source: VideoFile | ImageFolder
        if video_file is not None:
            self._path = Path(video_file)
            self._source = VideoFile(self._path, fps, start or 0.0, end)
        elif image_folder is not None:
            self._path = Path(image_folder)
            self._source = ImageFolder(self._path)
            if given := [f"{name}={value!r}" for name, value in part.items() if value is not None]:
                raise ValueError(f"{', '.join(given)} need a video file: the images of a folder have no rate")
        self.fit = fit
        self._length = len(self._source)
        self._shape = shape or self._source.common_size()[::-1]
        self._tell_of_cropping()

    @property
    def fps(self) -> float | None:
        """Frames a second; 0.0 for a file without a rate, None for folders."""
        return None if self._source.fps is None else float(self._source.fps)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, item: slice) -> list[Image.Image]: ...

    @overload
    def __getitem__(self, item: SupportsIndex) -> Image.Image: ...

    def __getitem__(self, item: slice | SupportsIndex) -> Image.Image | list[Image.Image]:
        if isinstance(item, slice):
            indices = range(self._length)[item]
            frames = [self[index] for index in sorted(indices)]
            return frames if indices.step > 0 else frames[::-1]
        index = operator.index(item)
        if not -self._length <= index < self._length:
            raise IndexError(f"frame {index} of a video of {self._length} frames")
        image = self._source.frame(index % self._length)
        if index % self._length == self._length - 1:
            self._source.close()
        return fit_frame(image, *self._shape, self.fit)

    def __iter__(self) -> Iterator[Image.Image]:
        with closing(self._source.stream()) as stream:
            for _ in range(self._length):
                yield fit_frame(next(stream), *self._shape, self.fit)

    def __repr__(self) -> str:
        height, width = self._shape
        return f"VideoData({str(self._path)!r}, frames={len(self)}, {height=}, {width=}, fps={self.fps})"

    def __enter__(self) -> "VideoData":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoder. The video stays usable, since the next `video[i]` opens it again."""
        self._source.close()

    def set_length(self, n: int) -> None:
        """Use the first n frames only; ValueError unless n is an integer from 1 to the frames available."""
        if checked_int("n", n) > len(self._source):
            raise ValueError(f"n must be at most {len(self._source)}, the frames of {self._path}, got {n}")
        self._length = int(n)

    def set_shape(self, height: int, width: int) -> None:
        """Set the size that frames are fitted to.

        Args:
            height, width: size in pixels; ValueError unless they are integers above 0.
        """
        self._shape = checked_int("height", height), checked_int("width", width)
        self._tell_of_cropping()

    def _tell_of_cropping(self) -> None:
        if self.fit == "crop" and isinstance(self._source, VideoFile):
            warn_of_cropping(self._source.common_size(), self._shape[::-1])

    def shape(self) -> tuple[int, int]:
        """Return (height, width) of the frames."""
        return self._shape

    def raw_data(self) -> list[Image.Image]:
        """Return all frames in a list."""
        return list(self)

    def save_images(self, folder: str | PathLike) -> None:
        """Write the frames to folder (made if missing) as 0.png, 1.png, ...

        Raises FileExistsError if the folder already holds images. After an error no new image remains.
        """
        write_pngs(iter(self), Path(folder), digits=1)
