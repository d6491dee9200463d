"""Past runs, found in the output folder by their records, and their pictures."""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffsynth.data import VideoData, save_video
from diffsynth.data.files import sha256_of_video, written_whole
from diffsynth.evaluation.grid import side_by_side
from diffsynth.runs.record import RunRecord, read_record, record_path

LARGEST_RECORD = 2_000_000  # bytes
MOST_SHOWN = 24
POSTER_HEIGHT = 160  # pixels
_COMPARED_HEIGHT = 320
_SUFFIXES = (".mp4.json", ".m4v.json", ".mov.json", ".mkv.json", ".avi.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class PastRun:
    """A video and its record."""

    video: Path
    record: RunRecord

    @property
    def record_file(self) -> Path:
        return record_path(self.video)

    @property
    def seconds(self) -> float:
        """What the run took."""
        return self.record.cost["time_gen"] + sum(self.record.cost["stage_seconds"].values())


def past_runs(folder: Path, most: int = MOST_SHOWN) -> list[PastRun]:
    """The latest runs in a folder, newest first. What is no whole record, or a link, is passed over."""
    if not folder.is_dir():
        return []
    files = [path for path in folder.iterdir() if path.name.endswith(_SUFFIXES) and _is_plain(path)]
    files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    runs: list[PastRun] = []
    for file in files:
        run = _run_of(file)
        if run is not None:
            runs.append(run)
        if len(runs) == most:
            break
    return runs


def find_run(folder: Path, name: str) -> PastRun:
    """The run of a video's name in the folder. Raises ValueError for one that is not there."""
    file = record_path(folder / name)
    run = _run_of(file) if Path(name).name == name and _is_plain(file) else None
    if run is None:
        raise ValueError(f"there is no past run {name!r} any more")
    return run


def poster(run: PastRun, cache: Path) -> Path:
    """A picture of the run's middle frame, made once in the cache folder."""
    path = cache / f"{_mark(run)}.webp"
    if not path.is_file():
        with VideoData(run.video) as video:
            frame = video[len(video) // 2]
        size = (max(1, round(frame.width * POSTER_HEIGHT / frame.height)), POSTER_HEIGHT)
        smooth = Image.Resampling.LANCZOS if frame.height > POSTER_HEIGHT else Image.Resampling.NEAREST
        with written_whole(path) as temporary:
            frame.resize(size, smooth).save(temporary)
    return path


def compared(run: PastRun, cache: Path) -> Path:
    """Reference and result side by side, made once in the cache folder; the result alone if its reference is
    gone.
    """
    path = cache / f"{_mark(run)}-side-by-side.mp4"
    if path.is_file():
        return path
    with VideoData(run.video) as video:
        height, width = video.shape()
        videos = {"result": video.raw_data()}
    reference = run.record.reference
    if reference is not None:
        with suppress(OSError, ValueError, TypeError):
            videos = {
                "reference": _reference_frames(reference, height, width, len(videos["result"])),
                **videos,
            }
    frames = side_by_side(videos, height=max(_COMPARED_HEIGHT, min(height, 480)))
    return save_video(frames, path, fps=run.record.video["fps"], quality=8)


def _reference_frames(reference: Mapping[str, Any], height: int, width: int, count: int) -> list[Image.Image]:
    """Raises ValueError if the recorded file is another one now."""
    path = Path(reference["path"])
    if sha256_of_video(path) != reference["sha256"]:
        raise ValueError(f"{path} is not the recorded reference")
    place = {"image_folder" if path.is_dir() else "video_file": path}
    with VideoData(**place, height=height, width=width) as seen:
        return seen[:count]


def _run_of(record_file: Path) -> PastRun | None:
    video = record_file.with_suffix("")
    try:
        if record_file.stat().st_size > LARGEST_RECORD or not _is_plain(video):
            return None
        return PastRun(video=video, record=read_record(record_file))
    except (OSError, ValueError):
        return None


def _is_plain(path: Path) -> bool:
    """A file, and no link that might lead elsewhere."""
    return path.is_file() and not path.is_symlink()


def _mark(run: PastRun) -> str:
    facts = run.video.stat()
    return hashlib.sha256(f"{run.video.name} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:20]
