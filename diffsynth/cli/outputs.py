"""Output files: checked before the work, published whole after it, never over something that was there."""

import contextlib
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from diffsynth.cli.errors import UsageError
from diffsynth.data.writer import VIDEO_SUFFIXES, save_video
from diffsynth.runs.record import RunRecord, read_record, record_path, save_with_metadata, write_record


def check_folder(folder: Path) -> None:
    """Raises UsageError unless files can be made in the folder."""
    if not folder.is_dir():
        raise UsageError(f"output folder {folder} does not exist; make it first: mkdir -p {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".trying-"):
            pass
    except OSError as error:
        raise UsageError(f"output folder {folder} cannot be written to: {error.strerror}") from error


def check_output(path: Path, overwrite: bool) -> None:
    """Raises UsageError if a video cannot be written to path, or would replace something unasked."""
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise UsageError(f"output {path} must end in one of {', '.join(VIDEO_SUFFIXES)}")
    if path.is_dir():
        raise UsageError(f"output {path} is a folder; give the name of a video file")
    check_folder(path.parent)
    if overwrite:
        return
    if path.exists() or path.is_symlink():
        raise UsageError(f"output {path} exists; give another name, or --overwrite")
    if record_path(path).exists() and not _is_record(record_path(path)):
        raise UsageError(f"{record_path(path)} exists and is no record of a run; give another name")


def reserve_name(folder: Path, stem: str, suffix: str = ".mp4") -> Path:
    """An empty new file in the folder, so that no earlier result is lost and no other run takes the name."""
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        with contextlib.suppress(FileExistsError):
            path.open("x").close()
            return path
    raise AssertionError("unreachable")


def publish(
    frames: Sequence[Image.Image],
    path: Path,
    record: RunRecord,
    *,
    fps: float,
    quality: float,
    overwrite: bool = False,
) -> Path:
    """Write a video with its record inside, and the record beside it; return the video's path.

    The video appears whole. Without overwrite, a name that was taken meanwhile gets a number.
    """
    with written_aside(path, overwrite) as (temporary, final):
        save_with_metadata(frames, temporary, record, fps=fps, quality=quality)
    write_record(record, final[0])
    return final[0]


def publish_plain(
    frames: Sequence[Image.Image], path: Path, *, fps: float, quality: float = 8, overwrite: bool = False
) -> Path:
    """As `publish`, for a video without a record."""
    with written_aside(path, overwrite) as (temporary, final):
        save_video(frames, temporary, fps=fps, quality=quality)
    return final[0]


@contextlib.contextmanager
def written_aside(path: Path, overwrite: bool) -> Iterator[tuple[Path, list[Path]]]:
    """A hidden name beside path to write to, which takes path's place at the end; and a list that then holds
    the path that it became. An error leaves nothing.
    """
    target = path.resolve() if overwrite else path
    temporary = target.with_name(f".writing-{uuid.uuid4().hex}{target.suffix}")
    final: list[Path] = []
    try:
        yield temporary, final
        if overwrite:
            os.replace(temporary, target)
        final.append(path if overwrite else _place(temporary, target))
    finally:
        temporary.unlink(missing_ok=True)


def _place(file: Path, target: Path) -> Path:
    """Give a file the name of target, or the next one that is free; return it."""
    for number in itertools.count(1):
        path = target if number == 1 else target.with_stem(f"{target.stem}-{number}")
        try:
            os.link(file, path)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            path = reserve_name(target.parent, target.stem, target.suffix)
            os.replace(file, path)
        return path
    raise AssertionError("unreachable")


def _is_record(path: Path) -> bool:
    try:
        read_record(path)
    except ValueError:
        return False
    return True
