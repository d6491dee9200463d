"""Reference videos: VideoData gives the frames of a video file or an image folder as PIL images.

Files are decoded by the ffmpeg binary that imageio-ffmpeg brings along. It passes every decoded frame on once
(no frame is doubled or dropped to even out a variable frame rate) and turns frames upright.
"""

import logging
import operator
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from PIL import Image

from diffsynth.data.frames import ImageFolder, checked_int, fit_frame, write_pngs

logger = logging.getLogger(__name__)

# V: the first true video stream, not the cover picture of a song.
EVERY_FRAME_ONCE = ("-map", "0:V:0", "-fps_mode", "passthrough")
# "[h264 @ 0x55] [error] words": the tag counts before the words only: a file may be named "[error].mp4".
COMPLAINT = re.compile(r"^(?:\[[^\]]+ @ \w+\] )*\[(?:error|fatal)\] (.*)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFacts:
    """What decoding a file showed.

    num_frames: frames that decode; size: their (width, height), upright; fps: the mean rate, 0.0 if unknown;
    promised_frames: what the header says, from duration and rate (so about); error: first complaint of the
    decoder, or None.
    """

    num_frames: int
    size: tuple[int, int]
    fps: float
    promised_frames: int
    error: str | None


def probe_video(path: Path) -> VideoFacts:
    """Decode the whole file once, without keeping frames, and report the facts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, empty, no video, or none of its frames decodes; the message says which.
    """
    if not path.exists():
        raise FileNotFoundError(f"video file {path} does not exist")
    if not path.is_file():
        raise ValueError(f"video file {path} is not a file; for a folder of images give image_folder")
    if path.stat().st_size == 0:
        raise ValueError(f"video file {path} is empty (0 bytes)")
    command = [
        *_ffmpeg_input(path, "level+info"),
        *EVERY_FRAME_ONCE,
        "-f",
        "null",
        "-progress",
        "pipe:1",
        "-",
    ]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    log = result.stderr.decode(errors="replace")
    errors = COMPLAINT.findall(log)
    if any("matches no streams" in error for error in errors):
        raise ValueError(f"video file {path} has no video stream")
    with closing(decode_video(path)) as decoder:
        first = next(decoder, None)
    counts = re.findall(rb"^frame=\s*(\d+)", result.stdout, re.MULTILINE)
    if first is None or not counts or int(counts[-1]) == 0:
        reason = errors[0] if errors else "no frame decodes"
        raise ValueError(f"video file {path} cannot be decoded, it is damaged or no video: {reason}")
    num_frames = int(counts[-1])
    duration = _duration(log)
    fps = _frame_rate(log) or (num_frames / duration if duration else 0.0)
    promised = round(duration * fps)
    error = errors[0] if errors else None
    return VideoFacts(num_frames=num_frames, size=first.size, fps=fps, promised_frames=promised, error=error)


def _ffmpeg_input(path: Path, loglevel: str) -> list[str]:
    from imageio_ffmpeg import get_ffmpeg_exe

    # "file:" keeps names with a colon or a leading dash from being read as a protocol or an option.
    options = ["-nostdin", "-hide_banner", "-nostats", "-loglevel", loglevel]
    return [get_ffmpeg_exe(), *options, "-i", f"file:{path.absolute()}"]


def _duration(log: str) -> float:
    match = re.search(r"Duration: (\d+):(\d+):(\d+\.?\d*)", log)
    if match is None:
        return 0.0
    hours, minutes, seconds = (float(part) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _frame_rate(log: str) -> float:
    line = next((line for line in log.splitlines() if "Stream #" in line and "Video:" in line), "")
    match = re.search(r" (\d+\.?\d*)(k?) fps", line)
    return float(match[1]) * (1000 if match[2] else 1) if match else 0.0


def decode_video(path: Path) -> Iterator[Image.Image]:
    """Yield every frame of the file in order; the decoder process ends with the generator."""
    command = [*_ffmpeg_input(path, "quiet"), *EVERY_FRAME_ONCE]
    # PPM pictures say their own size, so turned frames need no second source for it.
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        while process.stdout.readline().strip() == b"P6":
            width, height = (int(word) for word in process.stdout.readline().split())
            process.stdout.readline()
            pixels = process.stdout.read(3 * width * height)
            if len(pixels) < 3 * width * height:
                return
            yield Image.frombytes("RGB", (width, height), pixels)
    finally:
        process.stdout.close()
        process.kill()
        process.wait()


def _promised_frames(path: Path, num_frames: int) -> Iterator[Image.Image]:
    """The first num_frames frames of path; ValueError if the file changed and has fewer by now.

    No method, so that the running generator does not keep the VideoFile alive that holds it.
    """
    with closing(decode_video(path)) as decoder:
        for index in range(num_frames):
            image = next(decoder, None)
            if image is None:
                raise ValueError(f"{path} changed: {index} frames decode, {num_frames} when it was opened")
            yield image


class VideoFile:
    """Frames of a video file.

    One decoder stays open between calls of `frame` and only moves forward; an earlier frame starts it again.
    """

    def __init__(self, path: Path) -> None:
        facts = probe_video(path)
        # The error decides, not the promise: a sound track longer than the pictures makes that too high.
        if facts.error is not None:
            logger.warning(
                "%s is damaged: %d frames decode, its header promises about %d (%s)",
                path,
                facts.num_frames,
                facts.promised_frames,
                facts.error,
            )
        self._path = path
        self._num_frames = facts.num_frames
        self._size = facts.size
        self.fps = facts.fps
        self._decoder: Iterator[Image.Image] | None = None
        self._position = 0
        self._last: Image.Image | None = None

    def __len__(self) -> int:
        return self._num_frames

    def common_size(self) -> tuple[int, int]:
        """(width, height) of the frames."""
        return self._size

    def frame(self, index: int) -> Image.Image:
        """Frame at 0 <= index < len, upright RGB; a copy, so that drawing on it changes nothing here."""
        if index < self._position - 1 or (self._decoder is None and index != self._position - 1):
            self.close()
            self._decoder = self.stream()
            self._position = 0
        while self._position <= index:
            self._last = self._next_frame()
            self._position += 1
        return self._last.copy()

    def _next_frame(self) -> Image.Image:
        try:
            return next(self._decoder)
        except ValueError:
            self.close()
            raise

    def stream(self) -> Iterator[Image.Image]:
        """All frames in order from a decoder of its own."""
        return _promised_frames(self._path, self._num_frames)

    def close(self) -> None:
        """Stop the decoder; the frame given last is kept."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


class VideoData:
    """Frames of a video file or of a folder of images, as upright PIL images of mode RGB.

    Behaves as a sequence: `len`, `video[i]` (negative too), `video[a:b]` (a list), iteration. Frames are read
    when asked for, going forward decodes each once, and iteration holds one at a time. A video file is
    decoded once on opening, so that `len` is the number of frames that truly decode, whatever the header
    says; a damaged file is used as far as it decodes, with a warning in the log. The decoder is freed at the
    last frame, by `close()`, at the end of a `with` block, or with the object.

    Args:
        video_file: path of a video; exactly one of video_file and image_folder is given.
        image_folder: path of a folder of png, jpg, jpeg, webp, bmp files, in natural order (2 before 10).
        height, width: size in pixels to bring frames to (see `fit_frame`); both or neither.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        TypeError: a path is neither str nor PathLike.
        ValueError: arguments contradict each other, the file is damaged or no video, the folder holds no
            images, or images of differing sizes and no height and width are given.
    """

    def __init__(
        self,
        video_file: str | PathLike | None = None,
        image_folder: str | PathLike | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        if (video_file is None) == (image_folder is None):
            raise ValueError(
                f"give exactly one of video_file and image_folder, got {video_file!r} and {image_folder!r}"
            )
        if (height is None) != (width is None):
            raise ValueError(f"give both height and width or neither, got height={height!r}, width={width!r}")
        target = None if height is None else (checked_int("height", height), checked_int("width", width))
        self._path = Path(image_folder if video_file is None else video_file)
        self._source = ImageFolder(self._path) if video_file is None else VideoFile(self._path)
        self._shape = target or self._source.common_size()[::-1]
        self._length = len(self._source)

    @property
    def fps(self) -> float | None:
        """Frames per second (the mean of a variable rate; 0.0 if the file tells none); None for folders."""
        return self._source.fps

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int | slice) -> Image.Image | list[Image.Image]:
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
        return fit_frame(image, *self._shape)

    def __iter__(self) -> Iterator[Image.Image]:
        with closing(self._source.stream()) as stream:
            for _ in range(self._length):
                yield fit_frame(next(stream), *self._shape)

    def __repr__(self) -> str:
        height, width = self._shape
        return f"VideoData({str(self._path)!r}, frames={len(self)}, {height=}, {width=}, fps={self.fps})"

    def __enter__(self) -> "VideoData":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoder. The video stays usable: the next `video[i]` opens it again."""
        self._source.close()

    def set_length(self, n: int) -> None:
        """Use the first n frames only; ValueError unless n is an integer from 1 to the frames available."""
        if checked_int("n", n) > len(self._source):
            raise ValueError(f"n must be at most {len(self._source)}, the frames of {self._path}, got {n}")
        self._length = int(n)

    def shape(self) -> tuple[int, int]:
        """(height, width) of the frames given out."""
        return self._shape

    def raw_data(self) -> list[Image.Image]:
        """All frames in a list."""
        return list(self)

    def save_images(self, folder: str | PathLike) -> None:
        """Write the frames to folder (made if missing) as 0.png, 1.png, ...

        FileExistsError if the folder holds images already: none is overwritten. An error leaves none behind.
        """
        write_pngs(iter(self), Path(folder), digits=1)
