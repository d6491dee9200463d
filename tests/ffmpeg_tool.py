"""The ffmpeg program, with which tests make files that cameras and other tools would make."""

import subprocess

from imageio_ffmpeg import get_ffmpeg_exe


def ffmpeg(*arguments: object) -> None:
    """Run ffmpeg with these arguments; existing files are replaced."""
    subprocess.run([get_ffmpeg_exe(), "-y", "-loglevel", "error", *map(str, arguments)], check=True)
