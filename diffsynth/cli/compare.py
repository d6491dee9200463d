"""`fastvmt compare`: show videos beside each other, with labels."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path

from diffsynth.cli.console import DONE, Console
from diffsynth.configs.options import DEFAULT_FPS
from diffsynth.data import save_video
from diffsynth.data.tensors import Video
from diffsynth.evaluation.drawing import draw_trajectories
from diffsynth.evaluation.grid import video_grid
from diffsynth.evaluation.tracking import track_object
from diffsynth.jobs.errors import UsageError
from diffsynth.jobs.publish import check_output, write_output
from diffsynth.jobs.task import open_reference


def run(options: Namespace, console: Console) -> int:
    """Write the video that shows them all; UsageError for too few, or labels or an output that do not fit."""
    if len(options.videos) < 2:
        raise UsageError("give two or more videos to compare")
    labels = labels_of(options.videos, options.labels)
    check_output(options.output, options.overwrite, options.videos)
    opened = [open_reference(path) for path in options.videos]
    fps = options.fps or opened[0].fps or DEFAULT_FPS
    videos: dict[str, Video] = dict(zip(labels, opened, strict=True))
    if options.paths:
        videos = {label: draw_trajectories(v, [track_object(v).centroids]) for label, v in videos.items()}
    frames = video_grid(videos, columns=options.columns, height=options.height, until=options.until)
    save = partial(save_video, frames, fps=fps, quality=8)
    path = write_output(frames, options.output, save, options.overwrite)
    console.say(f"{path}: {len(frames)} frames, {' | '.join(labels)}")
    console.result({"output": str(path), "labels": labels, "frames": len(frames), "fps": fps})
    return DONE


def labels_of(videos: Sequence[Path], asked: Sequence[str] | None) -> list[str]:
    """Return a label for each video: those asked for (UsageError if they do not fit), else unlike names."""
    if asked is not None:
        if len(asked) != len(videos) or len(set(asked)) != len(asked):
            raise UsageError(f"--labels must be {len(videos)} different texts; got {', '.join(asked)}")
        return list(asked)
    labels: list[str] = []
    for name in (path.resolve().stem for path in videos):
        numbered = (f"{name} ({number})" for number in count(2))
        labels.append(next(label for label in chain([name], numbered) if label not in labels))
    return labels
