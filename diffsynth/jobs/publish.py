"""Output files: checked before a run, published whole after it, never over an existing file unasked."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from diffsynth.data.files import written_whole
from diffsynth.data.writer import VIDEO_SUFFIXES
from diffsynth.jobs.errors import UsageError
from diffsynth.runs.record import RunRecord, read_record, record_path, save_with_metadata, write_record


def check_folder(folder: Path) -> None:
    """Raise UsageError unless files can be made in the folder."""
    if not folder.is_dir():
        raise UsageError(f"output folder {folder} does not exist; make it first: mkdir -p {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".trying-"):
            pass
    except OSError as error:
        raise UsageError(f"output folder {folder} cannot be written to: {error.strerror}") from error


def check_output(path: Path, overwrite: bool) -> None:
    """Raise UsageError if a video cannot be written to path, or would replace something unasked."""
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
    """Make an empty file with a free name, so that no earlier result is lost and no other run takes it."""
    for path in _numbered(folder / f"{stem}{suffix}"):
        with contextlib.suppress(FileExistsError):
            path.open("x").close()
            return path
    raise AssertionError("unreachable")


def publish(frames: Sequence[Image.Image], path: Path, record: RunRecord, *, overwrite: bool = False) -> Path:
    """Write a video with its record inside, and the record beside it. The video appears whole.

    Args:
        frames: of the video.
        path: of the video.
        record: of the run.
        overwrite: replace an existing file; otherwise a name that was taken meanwhile gets a number.

    Returns:
        The path that the video has.
    """
    final = write_aside(path, lambda file: save_with_metadata(frames, file, record), overwrite)
    write_record(record, final)
    return final


def write_aside(path: Path, write: Callable[[Path], object], overwrite: bool) -> Path:
    """Have a file written beside `path` and moved there; an error leaves no trace.

    Args:
        path: of the file.
        write: called with the hidden path to write to.
        overwrite: replace an existing file; otherwise a name that was taken meanwhile gets a number.

    Returns:
        The path that the file has.
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
    """Give a file the name of target, or the next free one, and return that."""
    for path in _numbered(target):
        try:
            os.link(file, path)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            path = reserve_name(target.parent, target.stem, target.suffix)
            os.replace(file, path)
        return path
    raise AssertionError("unreachable")


def _numbered(path: Path) -> Iterator[Path]:
    """Yield a path, then the same with -2, -3, ... at the end of its name."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _is_record(path: Path) -> bool:
    try:
        read_record(path)
    except ValueError:
        return False
    return True
