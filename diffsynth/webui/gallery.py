"""Past runs, found in the output folder by their records, and pictures of them."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from diffsynth.configs.defaults import RunDefaults
from diffsynth.configs.descriptors import NO_TRANSFER
from diffsynth.configs.fields import fields_of
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import ReferenceOptions
from diffsynth.data import VideoData, save_video
from diffsynth.data.files import written_whole
from diffsynth.data.tensors import Video
from diffsynth.evaluation.followed import with_paths
from diffsynth.evaluation.grid import side_by_side
from diffsynth.jobs.task import open_reference
from diffsynth.runs.identity import sha256_of_video
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
        """Path of the record beside the video."""
        return record_path(self.video)


def past_runs(folder: Path, most: int = MOST_SHOWN) -> list[PastRun]:
    """Return the `most` latest runs in a folder, newest first. Damaged records and links are left out."""
    return list(read_runs(folder, most))


def read_runs(folder: Path, most: int = MOST_SHOWN) -> Iterator[PastRun]:
    """As `past_runs`, but each record is read when it is asked for."""
    files = [path for path in folder.iterdir() if path.name.endswith(_SUFFIXES)] if folder.is_dir() else []
    files.sort(key=lambda path: path.lstat().st_mtime_ns, reverse=True)
    return islice(filter(None, map(_run_of, files)), most)


def find_run(folder: Path, name: str) -> PastRun:
    """Return the run whose video has this name in the folder; ValueError if the folder has no such run."""
    run = _run_of(record_path(folder / name)) if Path(name).name == name else None
    if run is None:
        raise ValueError(f"there is no past run {name!r} any more")
    return run


def poster(run: PastRun, cache: Path) -> Path:
    """Return the path of a picture of the run's middle frame, made once in the cache folder."""
    path = cache / f"{_video_hash(run)}.webp"
    if not path.is_file():
        with VideoData(run.video) as video:
            frame = video[len(video) // 2]
        size = (max(1, round(frame.width * POSTER_HEIGHT / frame.height)), POSTER_HEIGHT)
        smooth = Image.Resampling.LANCZOS if frame.height > POSTER_HEIGHT else Image.Resampling.NEAREST
        with written_whole(path) as temporary:
            frame.resize(size, smooth).save(temporary)
    return path


def compared(run: PastRun, cache: Path, without: PastRun | None = None) -> Path:
    """Return the path of a video of reference and result side by side, made once in the cache folder.

    It shows the result alone if the reference is missing or has changed, and a run without transfer between
    them if there is one.
    """
    names = "-".join(_video_hash(one) for one in (run, without) if one is not None)
    path = cache / f"{names}-side-by-side.mp4"
    if path.is_file():
        return path
    videos = _videos_of(run)
    if without is not None:
        result = videos.pop("result")
        videos |= {"no transfer": _videos_of(without)["result"], "result": result}
    return _save_row(run, videos, path)


def paths_drawn(run: PastRun, cache: Path) -> Path | None:
    """Return the path of a video as `compared` makes it, with the paths of the objects drawn into it.

    None unless reference and result show one object each, in front of a plain background.
    """
    path = cache / f"{_video_hash(run)}-paths.mp4"
    if path.is_file():
        return path
    videos = _videos_of(run)
    drawn = with_paths(videos) if len(videos) > 1 else None
    return None if drawn is None else _save_row(run, drawn, path)


def asked_for(run: PastRun, defaults: RunDefaults) -> tuple[dict[str, Any], list[Path | None]]:
    """Return the options that a run was asked for, by name, and its reference and first picture, if any.

    Raises:
        ValueError: the reference or the picture is not there any more, or has changed.
    """
    record = run.record
    values = {**record.options, **(record.reference or {}), "preset": record.preset, "prompt": record.prompt}
    if record.negative_prompt != defaults["negative_prompt"]:
        values["negative_prompt"] = record.negative_prompt
    values["mode"] = NO_TRANSFER
    if (motion := record.options["motion"]) is not None:
        declared = MotionGuidance.for_mode(
            motion["mode"], defaults.with_preset(record.preset).motion.get(motion["mode"], {})
        )
        values |= {"mode": motion["mode"], "motion_scale": round(motion["lr"][0] / declared.lr[0], 3)}
    sources: list[Path | None] = [None, None]
    for place, source in enumerate((record.reference, record.pictures.get("input_image"))):
        if source is not None:
            sources[place] = path = Path(source["path"])
            if not path.is_file() or sha256_of_video(path) != source["sha256"]:
                raise ValueError(f"{path.name}, which that run used, is not there any more or has changed")
    return values, sources


def _videos_of(run: PastRun) -> dict[str, Video]:
    """Return the frames of the reference, if it is there unchanged, and of the result."""
    with VideoData(run.video) as video:
        (height, width), result = video.shape(), video.raw_data()
    videos: dict[str, Video] = {}
    if (recorded := run.record.reference) is not None:
        with suppress(OSError, ValueError, TypeError):
            path, used = Path(recorded["path"]), fields_of(ReferenceOptions, recorded)
            if sha256_of_video(path) == recorded["sha256"]:
                with open_reference(path, used, height=height, width=width) as video:
                    videos["reference"] = list(islice(video, len(result)))
    return {**videos, "result": result}


def _save_row(run: PastRun, videos: Mapping[str, Video], path: Path) -> Path:
    height = max(_COMPARED_HEIGHT, min(run.record.video["height"], 480))
    shown = side_by_side(videos, height=height)
    return save_video(shown, path, fps=run.record.video["fps"], quality=8)


def _run_of(record_file: Path) -> PastRun | None:
    """Return the run of a record; None unless record and video are files, not links, and it is readable."""
    video = record_file.with_suffix("")
    with suppress(OSError, ValueError):
        are_files = all(path.is_file() and not path.is_symlink() for path in (record_file, video))
        if are_files and record_file.stat().st_size <= LARGEST_RECORD:
            return PastRun(video=video, record=read_record(record_file))
    return None


def _video_hash(run: PastRun) -> str:
    facts = run.video.stat()
    return hashlib.sha256(f"{run.video.name} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:20]
