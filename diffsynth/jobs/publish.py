"""Output files: checked before the work, published whole after it, never over something that was there."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from diffsynth.data.files import written_whole
from diffsynth.data.writer import VIDEO_SUFFIXES
from diffsynth.jobs.errors import UsageError
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
    """Make an empty new file, so that no earlier result is lost and no other run takes its name."""
    for number in itertools.count(1):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
        with contextlib.suppress(FileExistsError):
            path.open("x").close()
            return path
    raise AssertionError("unreachable")


def publish(frames: Sequence[Image.Image], path: Path, record: RunRecord, *, overwrite: bool = False) -> Path:
    """Write a video with its record inside, and the record beside it; return the video's path.

    The video appears whole. Without overwrite, a name that was taken meanwhile gets a number.
    """
    final = write_aside(path, lambda file: save_with_metadata(frames, file, record), overwrite)
    write_record(record, final)
    return final


def write_aside(path: Path, write: Callable[[Path], object], overwrite: bool) -> Path:
    """Have a file written beside `path` and moved there; return the path that it has then.

    With overwrite it replaces what is there; otherwise a name that was taken meanwhile gets a number. An
    error leaves no trace.
    """
    if overwrite:
        with written_whole(path.resolve()) as temporary:
            write(temporary)
        return path
    final = []
    with written_whole(path, lambda file, target: final.append(_place(file, target))) as temporary:
        write(temporary)
    return final[0]


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
