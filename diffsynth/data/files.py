"""Files that appear whole, locks, and hashes of files."""

import hashlib
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows, where what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PARTIAL = ".writing-"  # how the names of files begin that are still being written
CHUNK = 1 << 22  # bytes


class FileInUseError(ValueError):
    """Raised when another process holds a lock."""


def writable_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """Make a folder and return it; a ValueError names the argument if no file can be made in it."""
    if path == "" or not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{name} must be a path; got {path!r:.80}")
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"0")  # since a full disk still lets an empty file be made
    except OSError as error:
        raise ValueError(f"{name} {folder} cannot be written to: {error}") from error
    return folder


@contextmanager
def written_whole(path: Path, place: Callable[[Path, Path], object] = os.replace) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to; the file there replaces `path` when the context ends.

    A kill, a crash or a full disk leaves either the old or the new content; an error leaves no trace.

    Args:
        path: the file.
        place: called with (the hidden path, `path`) once the content is on the disk.
    """
    with unfinished(path) as temporary:
        yield temporary
        _sync(temporary)
        place(temporary, path)
    if os.name == "posix":
        _sync(path.parent)


@contextmanager
def unfinished(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new hidden file or folder beside `path`, which is gone when the context ends.

    Those that killed processes left for the same path are removed first: nobody holds their locks any more.

    Args:
        path: what will be replaced.
        folder: make a folder instead of a file.
    """
    # What is unfinished itself, as save_video's target below publish, belongs to the same path. So does a
    # name with another seed: the same command draws a new one, and must find what was left.
    name, seedless = path.name.removeprefix(PARTIAL), re.sub(r"-seed\d+", "", path.name)
    stem = name[:12] if name != path.name else hashlib.sha256(seedless.encode()).hexdigest()[:12]
    stem = PARTIAL + stem
    for left in path.parent.glob(f"{stem}-*"):
        if (handle := hold(left)) is not None:
            _remove(left)
            os.close(handle)
    while True:
        temporary = path.with_name(f"{stem}-{uuid.uuid4().hex[:12]}{'' if folder else path.suffix}")
        if folder:
            temporary.mkdir()
        else:
            temporary.open("xb").close()
        handle = hold(temporary, wait=True)
        if temporary.exists():
            break
        # Before it was locked, another process took it for one that was left.
        if handle is not None:
            os.close(handle)
    try:
        yield temporary
    finally:
        _remove(temporary)
        if handle is not None:
            os.close(handle)


def hold(path: Path, wait: bool = False) -> int | None:
    """Lock a path until the returned handle is closed; None if another process holds it or it is missing."""
    handle = None
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return handle
    if handle is not None:
        os.close(handle)
    return None


def _remove(path: Path) -> None:
    # Unlike shutil.rmtree without opening a file: there may be no handle left.
    if path.is_dir() and not path.is_symlink():
        for inside in path.iterdir():
            _remove(inside)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file until the context or the process ends; file systems without locks are not guarded.

    Raises:
        FileInUseError: another process holds the lock; the error has this message.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileInUseError(message) from error
    except (OSError, NotImplementedError) as error:
        logger.info("%s is not guarded against a second process: %s", path.parent, error)
    try:
        yield
    finally:
        lock.release()


def sha256_of_file(file: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
