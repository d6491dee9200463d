"""Check output paths before a run and write them atomically after it; never overwrite a file unasked."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from diffsynth.data.files import written_whole
from diffsynth.data.writer import VIDEO_SUFFIXES, save_frames
from diffsynth.jobs.errors import UsageError
from diffsynth.runs.record import RunRecord, read_record, record_path, save_with_metadata, write_record


def check_folder(folder: Path) -> None:
    """Raise UsageError unless files can be made in the folder, which need not exist yet."""
    there = _existing(folder)
    if not there.is_dir():
        raise UsageError(f"output folder {folder} cannot be made: {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there, prefix=".trying-"):
            pass
    except OSError as error:
        raise UsageError(f"output folder {folder} cannot be written to: {error.strerror}") from error


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_output(path: Path, overwrite: bool, sources: Iterable[str | Path] = ()) -> None:
    """Raise UsageError if a video cannot be written to path, or would replace something unasked."""
    check_place(path)
    check_free(path, overwrite, sources)


def check_free(path: Path, overwrite: bool, sources: Iterable[str | Path] = ()) -> None:
    """Raise UsageError if writing to this path would overwrite a file without `overwrite`, or a source."""
    if path.resolve() in [Path(source).resolve() for source in sources]:
        raise UsageError(f"output {path} would replace the video that it is made from; give another name")
    if is_png_folder(path) and path.is_dir() and any(path.iterdir()):
        raise UsageError(f"output folder {path} has files in it; give an empty or a new one")
    if overwrite or is_png_folder(path):
        return
    if path.exists() or path.is_symlink():
        raise UsageError(f"output {path} exists; give another name, or --overwrite")
    if record_path(path).exists():
        try:
            read_record(record_path(path))
        except ValueError as error:
            raise UsageError(f"{record_path(path)} exists and is no run record; give another name") from error


def check_place(path: Path) -> None:
    """Raise UsageError if the path cannot be used for a video, whether or not a file exists there."""
    if path.parts[:1] == ("~",):
        raise UsageError(f"output {path}: the shell did not expand ~; write $HOME, or a space instead of =")
    check_folder(path.parent)
    if path.is_dir() and not (path.name and is_png_folder(path)):
        raise UsageError(f"output {path} is a folder; give the name of a video file")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(record_path(path).with_name(f".{path.name}.json"))  # longest name derived from path
    except OSError as error:
        raise UsageError(f"output {path} cannot be written: {error.strerror}") from error
    if not is_png_folder(path) and path.suffix.lower() not in VIDEO_SUFFIXES:
        kinds = ", ".join(VIDEO_SUFFIXES)
        raise UsageError(f"output {path} must end in one of {kinds}, or have no suffix: a folder of PNGs")


def check_space(path: Path, num_bytes: int, lossless: bool) -> None:
    """Raise UsageError if the disk of an output has too little room for it."""
    # At the best quality, H.264 compresses a noisy video to a tenth.
    needed = (num_bytes if lossless or is_png_folder(path) else num_bytes // 10) + 2**20
    free = shutil.disk_usage(_existing(path.parent)).free
    if free < needed:
        raise UsageError(f"{path.parent} has {free / 2**20:.1f} MiB free; it may need {needed / 2**20:.1f}")


def is_png_folder(path: Path) -> bool:
    """Return whether an output is a folder of PNG files: a path without a suffix."""
    return path.suffix == ""


def publish(frames: Sequence[Image.Image], path: Path, record: RunRecord, *, overwrite: bool = False) -> Path:
    """Write a video with its record as metadata, and the record beside it; return the path of the video."""
    final = write_output(frames, path, lambda file: save_with_metadata(frames, file, record), overwrite)
    write_record(record, final)
    return final


def write_output(
    frames: Sequence[Image.Image], path: Path, write_video: Callable[[Path], object], overwrite: bool
) -> Path:
    """Write PNG files into a folder, or a file by `write_video` that is moved to `path`; return its path.

    Without `overwrite`, -2, -3, ... is appended to a name taken during the run. An error leaves no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_png_folder(path):
        return save_frames(frames, path)
    if overwrite:
        with written_whole(path.resolve()) as temporary:
            write_video(temporary)
        return path
    final = []
    with written_whole(path, lambda file, target: final.append(_place(file, target))) as temporary:
        write_video(temporary)
    return final[0]


def _place(file: Path, target: Path) -> Path:
    """Put a file at target, or at the first free name with -2, -3, ... at its end; return the path used."""
    path, number = target, 1
    while True:
        with contextlib.suppress(FileExistsError):
            try:
                os.link(file, path)
            except OSError:  # the name is taken, or the file system has no hard links
                path.open("x").close()
                os.replace(file, path)
            return path
        number += 1
        path = target.with_name(f"{target.stem}-{number}{target.suffix}")
