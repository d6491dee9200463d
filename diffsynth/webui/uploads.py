"""Uploaded reference videos: checked before anything decodes them, and kept under safe names.

A playlist named .mp4 would make ffmpeg read other files, so the content decides what a file is.
"""

import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

from diffsynth.data.ffmpeg import file_url, run_ffmpeg
from diffsynth.data.files import sha256_of_file, unfinished, written_whole
from diffsynth.data.frames import UNREADABLE, to_rgb
from diffsynth.data.stream import EVERY_FRAME_ONCE, VIDEO_STREAM

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif")
# The first bytes of each kind: (offset, bytes).
_SIGNS: Mapping[str, tuple[tuple[int, bytes], ...]] = {
    ".mp4": ((4, b"ftyp"),),
    ".mov": ((4, b"moov"), (4, b"mdat"), (4, b"wide"), (4, b"free"), (4, b"skip")),
    ".mkv": ((0, b"\x1a\x45\xdf\xa3"),),
    ".avi": ((0, b"RIFF"),),
    ".gif": ((0, b"GIF8"),),
}
_FRAME = re.compile(rb"^0,", re.MULTILINE)  # a line of ffmpeg's list of packets or frames
_SIZE = re.compile(rb"^#dimensions 0: (\d+)x(\d+)", re.MULTILINE)
_HEAD = 16  # bytes
HASH_LENGTH = 12  # of a file's hash, in its name


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadLimits:
    """Limits of an upload, all above 0."""

    megabytes: float = 200  # size of the file in units of 2**20 bytes
    frames: int = 2000  # number of frames
    pixels: int = 4096 * 2304  # pixels of a frame
    pixels_of_all: int = 2000 * 1920 * 1080  # pixels of all frames; decoding takes 15 s
    seconds: float = 30  # time that reading it once may take


def keep_upload(path: str | Path, folder: Path, kept_in: Path, limits: UploadLimits) -> Path:
    """Return the copy of a checked upload, under a safe name made of its name and hash.

    Raises:
        ValueError: the file is outside of `folder`, a link, too large, too long or no video. The message is
            shown to the user, and nothing is left in `kept_in`.
    """
    kept_in.mkdir(parents=True, exist_ok=True)
    with _open_inside(Path(path), folder, "file", limits) as source, unfinished(kept_in / "upload") as copy:
        kind = _kind(source)
        with copy.open("wb") as file:
            shutil.copyfileobj(source, file)
        digest = sha256_of_file(copy)[:HASH_LENGTH]
        kept = kept_in / f"{safe_stem(Path(path).stem.removesuffix(f'-{digest}'))}-{digest}{kind}"
        if kept.is_symlink() or not kept.is_file():
            _check_decodes(copy, limits)
            os.replace(copy, kept)
    return kept


def keep_picture(path: str | Path, folder: Path, kept_in: Path, limits: UploadLimits) -> Path:
    """Check an uploaded picture and keep its pixels as a PNG; arguments and errors as for `keep_upload`."""
    with _open_inside(Path(path), folder, "picture", limits) as source:
        try:
            opened = Image.open(source)
            if opened.width * opened.height > limits.pixels:
                raise ValueError(f"the picture has more than {limits.pixels} pixels; send a smaller one")
            picture = to_rgb(ImageOps.exif_transpose(opened))
        except UNREADABLE as error:
            raise ValueError("the uploaded file cannot be read as a picture") from error
    digest = hashlib.sha256(picture.tobytes()).hexdigest()[:HASH_LENGTH]
    kept = kept_in / f"{safe_stem(Path(path).stem)}-{digest}.png"
    kept_in.mkdir(parents=True, exist_ok=True)
    with written_whole(kept) as temporary:
        picture.save(temporary, "PNG")
    return kept


def safe_stem(name: str, otherwise: str = "reference") -> str:
    """Return the first 40 letters, digits, dashes and underscores of a name; `otherwise` if none is left."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:40].strip("-") or otherwise


def _open_inside(path: Path, folder: Path, name: str, limits: UploadLimits) -> BinaryIO:
    """Open an upload below the limit, so that the file that is checked is the one that is read."""
    folder = folder.resolve()
    refused = ValueError("the reference is not a file that was uploaded here; upload it again")
    try:
        inside = path.is_absolute() and path.resolve(strict=True) == folder / path.relative_to(folder)
        if not inside:
            raise refused
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        raise refused from error
    facts = os.fstat(file)
    if stat.S_ISREG(facts.st_mode) and facts.st_size <= limits.megabytes * 2**20:
        os.utime(path, (0, 0))  # it is copied now, and may go first when later uploads need room
        return os.fdopen(file, "rb")
    os.close(file)
    if not stat.S_ISREG(facts.st_mode):
        raise refused
    raise ValueError(f"the {name} is larger than {limits.megabytes:g} MB, the limit here")


def _kind(source: BinaryIO) -> str:
    head = source.read(_HEAD)
    source.seek(0)
    if not head:
        raise ValueError("the uploaded file is empty")
    for kind, signs in _SIGNS.items():
        if any(head[start : start + len(sign)] == sign for start, sign in signs):
            return kind
    raise ValueError(f"the uploaded file is no video of a known kind ({', '.join(SUFFIXES)})")


def _check_decodes(path: Path, limits: UploadLimits) -> None:
    """Count the packets and decode the first frame, within the limits; a run decodes what it uses."""
    source = ["-max_pixels", str(limits.pixels), "-i", file_url(path), *VIDEO_STREAM, *EVERY_FRAME_ONCE]
    ends = (["-c", "copy", "-frames:v", str(limits.frames + 1)], ["-frames:v", "1"])
    try:
        (packets, _), (first, log) = (
            run_ffmpeg([*source, *end, "-f", "framecrc", "-"], limits.seconds) for end in ends
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"the uploaded video takes longer than {limits.seconds:g} s to read; send a shorter one"
        ) from error
    if "exceeds specified max pixel count" in log:
        raise ValueError(f"the video's frames have more than {limits.pixels} pixels; send a smaller one")
    if not _FRAME.search(first):
        raise ValueError("the uploaded file cannot be decoded: it is damaged or no video")
    if (frames := len(_FRAME.findall(packets))) > limits.frames:
        raise ValueError(f"the uploaded video has more than {limits.frames} frames; send a shorter one")
    if (size := _SIZE.search(first)) and frames * int(size[1]) * int(size[2]) > limits.pixels_of_all:
        raise ValueError(
            f"the uploaded video has {frames} frames of {int(size[1])}x{int(size[2])}, and all may have "
            f"{limits.pixels_of_all:.3g} pixels; send a shorter or a smaller one"
        )
