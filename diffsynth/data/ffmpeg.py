"""The ffmpeg program that imageio-ffmpeg finds: its version, and its error messages."""

import logging
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

OLDEST = (5, 1)  # -fps_mode is new in it
# "[h264 @ 0x55] [error] words": the level counts before the words only; a file may be named "[error].mp4".
_COMPLAINT = re.compile(r"^(?:\[[^\]]+ @ \w+\] )*\[(?:error|fatal)\] (.*)$", re.MULTILINE)
_REPORT = threading.Lock()  # environment variables belong to the whole process


class FfmpegError(RuntimeError):
    """Raised when the ffmpeg program is missing, does not start or is too old."""


def run_ffmpeg(arguments: Sequence[str], seconds: float | None = None) -> tuple[bytes, str]:
    """Run ffmpeg to its end, whatever its exit status.

    Returns:
        The standard output, and the log; each line of the log has its level.

    Raises:
        FfmpegError: ffmpeg cannot run, is killed, or is older than 5.1.
        subprocess.TimeoutExpired: it takes more than that many seconds.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        command = [get_ffmpeg_exe(), "-nostdin", "-nostats", "-loglevel", "level+info", *arguments]
        env = {name: value for name, value in os.environ.copy().items() if name != "FFREPORT"}
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=env, timeout=seconds
        )
    except (ImportError, RuntimeError, OSError) as error:
        raise FfmpegError(
            f"ffmpeg, which reads and writes videos, does not run: {error}. Reinstall imageio-ffmpeg, or "
            f"name the program in the environment variable IMAGEIO_FFMPEG_EXE"
        ) from error
    if done.returncode < 0:
        raise FfmpegError(f"ffmpeg was killed by signal {-done.returncode}; {' '.join(command)}")
    log = done.stderr.decode(errors="replace")
    version = re.search(r"ffmpeg version n?(\d+)\.(\d+)", log + done.stdout[:200].decode(errors="replace"))
    if version and (int(version[1]), int(version[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise FfmpegError(f"ffmpeg {version[1]}.{version[2]} is too old: {oldest} is needed; {command[0]}")
    return done.stdout, log


def check_ffmpeg() -> str:
    """Return the first line of ffmpeg's version text; errors are those of `run_ffmpeg`."""
    return run_ffmpeg(["-version"])[0].decode(errors="replace").split("\n")[0]


def file_url(path: Path) -> str:
    """Return the name by which ffmpeg finds a file, whatever characters are in its path."""
    # "file:" keeps names with a colon or a leading dash from being read as a protocol or an option.
    return f"file:{path.absolute()}"


def complaints(log: str) -> list[str]:
    """Return the errors in the log of `run_ffmpeg`."""
    return _COMPLAINT.findall(log)


@contextmanager
def reported() -> Iterator[tuple[Callable[[], str], Callable]]:
    """Make the errors of imageio's ffmpeg processes readable.

    imageio does not pass ffmpeg's log on, but ffmpeg also writes its errors to the file that the environment
    variable FFREPORT names when it starts. An ffmpeg that another thread starts at that moment may write to
    it too, so this is for messages, not for decisions.

    Yields:
        A function that returns the errors so far, and a context in which to start the process.
    """
    with tempfile.TemporaryDirectory(prefix="fastvmt-") as folder:
        file = Path(folder) / "ffmpeg.log"

        def read() -> str:
            text = file.read_text(errors="replace") if file.is_file() else ""
            return re.sub(r"\ACommand line:\n.*\n", "", text).strip("\0\n ")

        @contextmanager
        def starting() -> Iterator[None]:
            name = re.sub(r"([\\:'])", r"\\\1", str(file))
            its_log = logging.getLogger("imageio_ffmpeg")
            with _REPORT:
                # imageio_ffmpeg warns if a filter changes the frame size, which is intended here. By default
                # it runs Python code between fork and exec, where a process with threads may hang.
                given = {"FFREPORT": f"file={name}:level=16", "IMAGEIO_FFMPEG_NO_PREVENT_SIGINT": "1"}
                level, before = its_log.level, {name: os.environ.get(name) for name in given}
                its_log.setLevel(logging.ERROR)
                os.environ.update(given)
                try:
                    yield
                finally:
                    its_log.setLevel(level)
                    for variable, value in before.items():
                        os.environ.pop(variable)
                        if value is not None:
                            os.environ[variable] = value

        yield read, starting
