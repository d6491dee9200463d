"""Probe a file's video stream, and choose the ffmpeg filters for upright RGB frames with square pixels.

An intact file is not decoded for this: ffmpeg reads its packets' timestamps, which takes milliseconds.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from diffsynth.data.ffmpeg import complaints, file_url, run_ffmpeg

# A capital V selects the first real video stream and skips cover pictures.
VIDEO_STREAM = ("-map", "0:V:0")
EVERY_FRAME_ONCE = ("-fps_mode", "passthrough")
# Without these flags swscale rounds down, which makes a picture one level darker at every reading.
EXACT_SCALING = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
BACKGROUND = "black"  # under transparent pixels
# 203 cd/m2 becomes the white of SDR video (ITU-R BT.2408); brighter highlights are compressed.
_TO_SDR = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=tonemap=mobius:desat=0:param=0.8,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)
_HDR = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
_HDR_USUAL = ("colorspace=bt2020nc", "color_primaries=bt2020")  # for what a file leaves open
# In 16 bits: in 8, premultiply makes opaque pixels one level darker.
_OVER_BLACK = "format=gbrap16,premultiply=inplace=1,format=gbrp"
_NO_TIME = -(2**63)  # AV_NOPTS_VALUE: the timestamp of a packet is unknown
# NTSC rates (such as 30 * 1000/1001), by the two decimals that ffmpeg prints.
_NTSC = {f"{rate * 1000 / 1001:.2f}": Fraction(rate * 1000, 1001) for rate in (24, 30, 48, 60, 120)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The video stream of a file.

    Attributes:
        times: presentation times of the frames in seconds, ascending; the first is 0 or shortly after.
        end: time in seconds at which the last frame ends.
        size: (width, height) of the frames once they are upright and have square pixels.
        rate: frames per second; the mean if the rate is variable.
        variable: whether any frame is more than half a frame away from its time at a constant rate.
        seeks: whether ffmpeg can start decoding at an exact frame in the middle.
        decoder: ffmpeg options that select a decoder, placed before the input.
        filters: ffmpeg filters that run before frames are scaled to `size`.
        notes: messages that describe these conversions, for the log.
        error: the first error message of ffmpeg; None for an intact file.
        promised: approximate number of frames according to the header: duration times rate.
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
    """Return the properties of a file's video stream.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the path is a folder, an empty file, not a video, or a video without frames.
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
        # If the file is damaged or lacks timestamps, its packets do not tell its frames: decode it.
        frames = ["-i", file_url(path), *VIDEO_STREAM, *EVERY_FRAME_ONCE, "-f", "framecrc", "-"]
        packets, decoding = run_ffmpeg(frames)
        times, ends = _shown(packets)
        errors += complaints(decoding)
        if len(times) == 0:
            reason = errors[0] if errors else "no frame decodes"
            raise ValueError(f"video file {path} cannot be decoded: it is damaged or no video: {reason}")
    line = next(iter(re.findall(r"Stream #.*: Video:(?!.*\(attached pic\)).*", log)), "")
    told = _told_rate(line)
    gap = float(np.median(np.diff(times))) if len(times) > 1 else float(1 / told) if told else 0.0
    end = max(ends[-1], times[-1] + (0 if ends[-1] > times[-1] else gap))
    mean = Fraction(len(times) / (end - times[0])) if end > times[0] else told or Fraction(0)
    rate = told if told and abs(told / mean - 1) < Fraction(1, 200) else mean.limit_denominator(1000)
    even = np.linspace(times[0], times[-1], len(times))  # the told rate has two decimals, and would drift
    decoder, filters, notes = _treatment(log, line)
    size, shape_notes = _upright_size(log, line)
    if 0 in size:
        raise ValueError(f"video file {path} does not state its frame size: it is damaged or no video")
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


def video_damage(path: Path, size: tuple[int, int, int]) -> str | None:
    """Return what is wrong with a video file of (frames, height, width); None if all its frames decode."""
    try:
        stream = probe_video(path)
    except ValueError as error:
        return str(error)
    found = (len(stream.times), *stream.size[::-1])
    if found != size:
        return "it has {} frames of {}x{}, and {} of {}x{} were written".format(*found, *size)
    errors = complaints(run_ffmpeg(["-i", file_url(path), *VIDEO_STREAM, "-f", "null", "-"])[1])
    return errors[0] if errors else None


def _shown(packets: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end of each frame in seconds, from ffmpeg's packet list; empty if any is unknown."""
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
    """Return the frame rate in a line of ffmpeg's log, which has two decimals: 29.97 means 30000/1001."""
    match = re.search(r" (\d+\.?\d*)(k?) fps", line)
    if match is None or float(match[1]) == 0:
        return None
    return Fraction(match[1]) * 1000 if match[2] else _NTSC.get(match[1], Fraction(match[1]))


def _upright_size(log: str, line: str) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Return (width, height) after rotation and with square pixels, and messages for the log."""
    match = re.search(r", (\d+)x(\d+)", line)
    if match is None:
        return (0, 0), ()
    width, height = int(match[1]), int(match[2])
    notes = []
    # If the container's differs from the codec's, it comes last, and counts.
    across, up = map(int, (re.findall(r"SAR (\d+):(\d+)", line) or [(1, 1)])[-1])
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
    """Return decoder options, filters, and messages about both for the log."""
    decoder: tuple[str, ...] = ()
    filters, notes = [], []
    if re.search(r"\b(top|bottom) (first|coded first)", line):
        filters.append("bwdif=mode=send_frame")
        notes.append("deinterlaced")
    codec = re.search(r"Video: (vp[89])\b", line)
    if codec and re.search(r"alpha_mode\s*: 1", log, re.IGNORECASE):
        decoder = ("-c:v", {"vp8": "libvpx", "vp9": "libvpx-vp9"}[codec[1]])  # others skip alpha
    if decoder or re.search(r", (yuva|gbrap|rgba|bgra|argb|abgr|ya8|ya16|pal8)", line):
        filters.append(_OVER_BLACK)
        notes.append(f"transparent pixels, if any, laid over {BACKGROUND}")
    if hdr := re.search(rf"(\w+)/(\w+)/({'|'.join(_HDR)})", line):
        missing = [value for value, told in zip(_HDR_USUAL, hdr.groups(), strict=False) if told == "unknown"]
        filters += [f"setparams={':'.join(missing)}"] if missing else []
        filters.append(_TO_SDR)
        notes.append(f"HDR ({_HDR[hdr[3]]}) tone-mapped to ordinary video")
    return decoder, tuple(filters), tuple(notes)
