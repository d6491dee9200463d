"""Facts of a video file's stream, and the filters that make upright RGB frames of square pixels of it.

The file is not decoded for it: ffmpeg reads the times of its packets, which takes milliseconds.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from diffsynth.data.ffmpeg import complaints, file_url, run_ffmpeg

# V: the first true video stream, not the cover picture of a song.
VIDEO_STREAM = ("-map", "0:V:0")
EVERY_FRAME_ONCE = ("-fps_mode", "passthrough")
# Without these flags swscale rounds down: every reading makes a picture a level darker.
EXACT_SCALING = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
BACKGROUND = "black"  # under transparent pixels
# Light of 203 cd/m2 is the white of ordinary video (ITU-R BT.2408); brighter light is compressed.
_TO_SDR = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=tonemap=mobius:desat=0:param=0.8,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)
_HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
_OVER_BLACK = "format=gbrap,premultiply=inplace=1,format=gbrp"
_NO_TIME = -(2**63)  # of a packet whose time ffmpeg does not know
# Rates that are often slowed by 1000/1001, by how ffmpeg rounds them.
_NTSC = {f"{rate * 1000 / 1001:.2f}": Fraction(rate * 1000, 1001) for rate in (24, 30, 48, 60, 120)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The video stream of a file.

    Attributes:
        times: seconds at which its frames are shown, ascending, from 0 on or shortly after.
        end: second at which the last frame ends.
        size: (width, height) of its frames as they are read: upright, with square pixels.
        rate: frames a second; the mean of a variable rate.
        variable: whether its frames stray from an even rate by more than half a frame.
        seeks: whether ffmpeg can begin in its middle, exactly.
        decoder: options of ffmpeg before the input.
        filters: what is done to the pictures before they are scaled to `size`.
        notes: the same in words.
        error: the first complaint of ffmpeg; None for a file that is whole.
        promised: number of frames that the header promises, from duration and rate, so about.
    """

    times: np.ndarray
    end: float
    size: tuple[int, int]
    rate: Fraction
    variable: bool
    seeks: bool
    decoder: tuple[str, ...]
    filters: tuple[str, ...]
    notes: tuple[str, ...]
    error: str | None
    promised: int


def probe_video(path: Path) -> Stream:
    """Return what a file says of its video stream.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, empty, no video, or has no frames; the message says which.
        FfmpegError: ffmpeg does not run.
    """
    if not path.exists():
        raise FileNotFoundError(f"video file {path} does not exist")
    if not path.is_file():
        raise ValueError(f"video file {path} is not a file; for a folder of images give image_folder")
    if path.stat().st_size == 0:
        raise ValueError(f"video file {path} is empty (0 bytes)")
    packets, log = run_ffmpeg(["-i", file_url(path), *VIDEO_STREAM, "-c", "copy", "-f", "framecrc", "-"])
    errors = complaints(log)
    if any("matches no streams" in error for error in errors):
        raise ValueError(f"video file {path} has no video stream")
    times, ends = _shown(packets)
    if errors or len(times) == 0:
        # Packets of a damaged file, or of one that does not say their times, are not its frames: decode them.
        frames = ["-i", file_url(path), *VIDEO_STREAM, *EVERY_FRAME_ONCE, "-f", "framecrc", "-"]
        packets, decoding = run_ffmpeg(frames)
        times, ends = _shown(packets)
        errors += complaints(decoding)
        if len(times) == 0:
            reason = errors[0] if errors else "no frame decodes"
            raise ValueError(f"video file {path} cannot be decoded, it is damaged or no video: {reason}")
    line = next((line for line in log.splitlines() if "Stream #" in line and ": Video:" in line), "")
    told = _told_rate(line)
    gap = float(np.median(np.diff(times))) if len(times) > 1 else float(1 / told) if told else 0.0
    end = max(ends[-1], times[-1] + (0 if ends[-1] > times[-1] else gap))
    mean = Fraction(len(times) / (end - times[0])) if end > times[0] else told or Fraction(0)
    rate = told if told and abs(told / mean - 1) < Fraction(1, 200) else mean.limit_denominator(1000)
    even = times[0] + np.arange(len(times)) / float(rate) if rate else times
    decoder, filters, notes = _treatment(log, line)
    size, shape_notes = _upright_size(log, line)
    if 0 in size:
        raise ValueError(f"video file {path} says no size of its frames: it is damaged or no video")
    duration = re.search(r"Duration: (\d+):(\d+):(\d+\.?\d*)", log)
    hours, minutes, seconds = map(float, duration.groups() if duration else (0, 0, 0))
    return Stream(
        times=times,
        end=end,
        size=size,
        rate=rate,
        variable=bool(rate) and float(np.abs(times - even).max()) > 0.5 / float(rate),
        seeks=re.search(r"Input #0, (mov|matroska|avi)", log) is not None,
        decoder=decoder,
        filters=filters,
        notes=(*shape_notes, *notes),
        error=errors[0] if errors else None,
        promised=round((3600 * hours + 60 * minutes + seconds) * told) if told else len(times),
    )


def _shown(packets: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the begins and ends, in seconds, of the frames in ffmpeg's list of packets; empty if unknown."""
    base = re.search(rb"^#tb 0: (\d+)/(\d+)", packets, re.MULTILINE)
    rows = re.findall(rb"^0, *-?\w+, *(-?\d+), *(\d+),", packets, re.MULTILINE)
    ticks = np.array(rows, dtype=np.int64).reshape(-1, 2)
    if base is None or (ticks[:, 0] == _NO_TIME).any():
        return np.empty(0), np.empty(0)
    ticks = ticks[ticks[:, 0] >= 0]
    ticks = ticks[np.argsort(ticks[:, 0], kind="stable")]
    second = int(base[2]) / int(base[1])
    return ticks[:, 0] / second, ticks.sum(axis=1) / second


def _told_rate(line: str) -> Fraction | None:
    """Return the frames a second in a header, which has two decimals; 29.97 is 30000/1001."""
    match = re.search(r" (\d+\.?\d*)(k?) fps", line)
    if match is None or float(match[1]) == 0:
        return None
    return Fraction(match[1]) * 1000 if match[2] else _NTSC.get(match[1], Fraction(match[1]))


def _upright_size(log: str, line: str) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Return (width, height) after rotation and with square pixels, and notes for the log."""
    match = re.search(r", (\d+)x(\d+)", line)
    if match is None:
        return (0, 0), ()
    width, height = int(match[1]), int(match[2])
    notes = []
    aspect = re.search(r"SAR (\d+):(\d+)", line)
    across, up = (int(aspect[1]), int(aspect[2])) if aspect else (1, 1)
    turned = re.search(r"display ?matrix: rotation of (-?\d+\.?\d*) degrees", log, re.IGNORECASE)
    if turned and round(float(turned[1]) / 90) % 2:
        width, height, across, up = height, width, up, across
    if turned and round(float(turned[1])) % 360:
        notes.append(f"turned by {round(float(turned[1])) % 360} degrees")
    if 0 not in (across, up) and across != up:
        wide = max(1, round(width * across / up))
        notes.append(f"pixels of {across}:{up} made square: {width}x{height} -> {wide}x{height}")
        width = wide
    return (width, height), tuple(notes)


def _treatment(log: str, line: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return options of the decoder, filters, and notes about both for the log."""
    decoder: tuple[str, ...] = ()
    filters, notes = [], []
    if re.search(r"\b(top|bottom) (first|coded first)", line):
        filters.append("bwdif=mode=send_frame")
        notes.append("deinterlaced")
    codec = re.search(r"Video: (vp[89])\b", line)
    if codec and re.search(r"alpha_mode\s*: 1", log, re.IGNORECASE):
        decoder = ("-c:v", {"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec[1]])  # vp8 and vp9 skip alpha
    if decoder or re.search(r", (yuva|gbrap|rgba|bgra|argb|abgr|ya8|ya16|pal8)", line):
        filters.append(_OVER_BLACK)
        notes.append(f"transparent pixels, if any, laid over {BACKGROUND}")
    kind = next((kind for name, kind in _HDR.items() if name in line), None)
    if kind:
        filters.append(_TO_SDR)
        notes.append(f"HDR ({kind}) tone-mapped to ordinary video")
    return decoder, tuple(filters), tuple(notes)
