"""Reading and writing video: seconds and ffmpeg processes, against imageio alone and DiffSynth's reader.

    python benchmarks/video_io.py CLIP [--frames 24] [--height 480] [--width 832] [--rounds 7]

All take turns in one process. DiffSynth-Studio's reader is built here of the same calls of imageio and
Pillow; "imageio" is the least that can be done: it reads, or writes, and nothing is counted or checked.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio.v2
import imageio.v3 as iio
import numpy as np
from PIL import Image

from diffsynth import VideoData, save_video
from diffsynth.data import fit_frame


def read_ours(clip: Path, frames: int, height: int, width: int) -> list[Image.Image]:
    return VideoData(clip, height=height, width=width)[:frames]


def read_imageio(clip: Path, frames: int, height: int, width: int) -> list[Image.Image]:
    read = iio.imiter(clip, plugin="FFMPEG")
    images = [fit_frame(Image.fromarray(next(read)), height, width) for _ in range(frames)]
    read.close()
    return images


def read_as_diffsynth(clip: Path, frames: int, height: int, width: int) -> list[Image.Image]:
    reader: Any = imageio.v2.get_reader(clip)
    reader.count_frames()  # its len()
    images = [fit_frame(Image.fromarray(np.array(reader.get_data(i))), height, width) for i in range(frames)]
    reader.close()
    return images


def write_ours(images: list[Image.Image], path: Path) -> None:
    save_video(images, path, fps=15, quality=5)


def write_imageio(images: list[Image.Image], path: Path) -> None:
    writer: Any = imageio.v2.get_writer(path, fps=15, quality=5, macro_block_size=1)
    for image in images:
        writer.append_data(np.asarray(image))
    writer.close()


def measured(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds and ffmpeg processes of a call."""
    started, popen = [], subprocess.Popen

    def noted(command: Any, *args: Any, **kwargs: Any) -> Any:
        started.append(command)
        return popen(command, *args, **kwargs)

    subprocess.Popen = noted  # type: ignore[misc, assignment]  # only here, to count
    begin = time.perf_counter()
    try:
        run()
    finally:
        subprocess.Popen = popen  # type: ignore[misc]
    return time.perf_counter() - begin, len(started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clip", type=Path)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    size = (options.clip, options.frames, options.height, options.width)
    images = read_ours(*size)
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], object]] = {
            "read, ours": lambda: read_ours(*size),
            "read, imageio": lambda: read_imageio(*size),
            "read, as DiffSynth": lambda: read_as_diffsynth(*size),
            "write, ours": lambda: write_ours(images, Path(folder) / "ours.mp4"),
            "write, imageio": lambda: write_imageio(images, Path(folder) / "imageio.mp4"),
        }
        results: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, run in ways.items():
                results[name].append(measured(run))
    print(f"{options.frames} frames of {options.clip.name} at {options.height}x{options.width}; medians")
    print("| | seconds | to imageio | ffmpeg processes |\n| --- | --- | --- | --- |")
    seconds = {name: statistics.median(s for s, _ in runs) for name, runs in results.items()}
    for name, runs in results.items():
        ratio = seconds[name] / seconds[f"{name.split(',')[0]}, imageio"]
        print(f"| {name} | {seconds[name]:.3f} | {ratio:.2f} | {runs[0][1]} |")


if __name__ == "__main__":
    main()
