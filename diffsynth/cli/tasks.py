"""One video to make: from options to the arguments of the pipeline's call, and from its frames to a file."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffsynth.cli.console import Console
from diffsynth.cli.errors import UsageError
from diffsynth.cli.models import Setup
from diffsynth.cli.options import CALL_CHOICES, CALL_OPTIONS, CALL_SWITCHES, MOTION
from diffsynth.cli.outputs import publish, reserve_name
from diffsynth.cli.progress import INTERRUPTED_TEXT, Progress, stopping_on_interrupt
from diffsynth.cli.saving import forget
from diffsynth.configs.defaults import EXACT, RunDefaults, with_preset
from diffsynth.data import VideoData
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.arguments import PUBLISHED_LENGTH, PUBLISHED_SIZE, video_length
from diffsynth.pipelines.guidance import DEFAULT_MODE, NO_TRANSFER
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.runs.record import RunRecord, describe_reference, make_record

logger = logging.getLogger(__name__)

DEFAULT_FPS = 15.0
DEFAULT_QUALITY = 8.0
NEGATIVE_PROMPT = (
    "oversaturated, overexposed, static, blurred details, subtitles, painting, still picture, grey, "
    "worst quality, low quality, JPEG artifacts, ugly, deformed, extra fingers, badly drawn hands, "
    "badly drawn face, fused fingers, motionless, cluttered background, three legs, "
    "crowd in the background, walking backwards"
)
_CALL_NAMES = ("prompt", "negative_prompt", *CALL_OPTIONS, *CALL_CHOICES, *CALL_SWITCHES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One video to make.

    call: arguments of the pipeline's call but input_video. video, reference: the reference and its
    description for the record. fps, quality: of the file. output: None for a new name in the current folder.
    saving: arguments of the call that save the run as it goes on. job: as in the record.
    """

    call: Mapping[str, Any]
    video: VideoData | None
    reference: Mapping[str, Any] | None
    fps: float
    quality: float
    output: Path | None = None
    overwrite: bool = False
    saving: Mapping[str, Any] = field(default_factory=dict)
    job: str | None = None


def open_reference(path: Path) -> VideoData:
    """A reference video from a file or a folder of images."""
    return VideoData(image_folder=path) if path.is_dir() else VideoData(path)


def run_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a namespace's values, those that `add_run_options` reads."""
    named = {*_CALL_NAMES, "fps", "quality"}
    return {name: value for name, value in given.items() if name in named or name.startswith(MOTION)}


def make_task(given: Mapping[str, Any], reference: Path | None, usual: RunDefaults, published: bool) -> Task:
    """The task that options ask for.

    given: from `run_options`. usual: the checkpoint's defaults; published: a published checkpoint, which is
    run at 480x832 (or 832x480) and at most 81 frames unless options say otherwise, with a usual negative
    prompt. Raises ValueError, naming it, for what cannot be; FileNotFoundError without the reference.
    """
    if "prompt" not in given:
        raise UsageError("--prompt is missing: what shall the video show?")
    if reference is None and given.get("mode") != NO_TRANSFER:
        raise UsageError("a reference video is missing; for a video from text alone give --mode No_transfer")
    video = None if reference is None else open_reference(reference)
    call = {name: given[name] for name in _CALL_NAMES if name in given}
    usual = with_preset(usual, call.get("preset", EXACT))
    if published:
        call = {"negative_prompt": NEGATIVE_PROMPT, **published_size(video, call), **call}
    video_length(call.get("num_frames"), usual, video)
    call["motion"] = motion_of(given, usual, video is not None)
    rate = None if video is None else video.fps
    return Task(
        call=call,
        video=video,
        reference=None if video is None else describe_reference(reference, len(video), rate),
        fps=given.get("fps", rate or DEFAULT_FPS),
        quality=given.get("quality", DEFAULT_QUALITY),
    )


def run_task(
    pipe: WanVideoPipeline, task: Task, model: Mapping[str, Any], setup: Setup, console: Console
) -> tuple[Path, RunRecord]:
    """Make the video and its record; return the path that it has now, and the record.

    Raises KeyboardInterrupt if it was interrupted, what the pipeline raises, and OSError if it cannot be
    written; no video is written then.
    """
    progress = Progress(console)
    call = {**task.call, **task.saving, "input_video": task.video}
    with stopping_on_interrupt(pipe, progress, console), setup.attention_kernel():
        try:
            frames = pipe(**call, observer=progress, progress_bar_cmd=iter)
        except (ValueError, RuntimeError, OSError) as error:
            # Ctrl-C reaches the ffmpeg that decodes the reference, too, and the run misses its frames.
            if progress.stopping:
                raise KeyboardInterrupt(INTERRUPTED_TEXT) from error
            raise
        if progress.stopping:
            raise KeyboardInterrupt(INTERRUPTED_TEXT)
    progress.stage("write")
    record = make_record(
        pipe,
        frames,
        prompt=call["prompt"],
        negative_prompt=call.get("negative_prompt", ""),
        preset=call.get("preset", EXACT),
        reference=task.reference,
        model=model,
        fps=task.fps,
        quality=task.quality,
        job=task.job,
    )
    path = _publish(frames, record, task, console)
    if task.saving:
        forget(task.saving["checkpoint_dir"], task.output)
    return path, record


def summary(path: Path, record: RunRecord) -> str:
    """One line: what was written and what it took."""
    video, cost = record.video, record.cost
    seconds = cost["time_gen"] + sum(cost["stage_seconds"].values())
    return (
        f"{path}: {video['frames']} frames of {video['width']}x{video['height']} at {video['fps']:g} frames "
        f"a second, seed {record.options['seed']}, {seconds:.1f} s"
    )


def _publish(frames: Sequence[Image.Image], record: RunRecord, task: Task, console: Console) -> Path:
    files = {"fps": task.fps, "quality": task.quality}
    if task.output is not None:
        path = publish(frames, task.output, record, **files, overwrite=task.overwrite)
        if path != task.output:
            console.problem(f"{task.output} was taken meanwhile: the video is {path}")
        return path
    path = reserve_name(Path.cwd(), _stem(task, record))
    try:
        return publish(frames, path, record, **files, overwrite=True)
    except BaseException:
        path.unlink()
        raise


def published_size(video: VideoData | None, call: Mapping[str, Any]) -> dict[str, int]:
    """Size and length of published checkpoints, where the call and the reference do not say otherwise."""
    size = {}
    if "height" not in call and "width" not in call:
        rows, cols = PUBLISHED_SIZE
        upright = video is not None and video.shape()[0] > video.shape()[1]
        size = {"height": cols, "width": rows} if upright else {"height": rows, "width": cols}
    length = PUBLISHED_LENGTH if video is None else min(PUBLISHED_LENGTH, len(video))
    if video is not None and length < len(video) and "num_frames" not in call:
        logger.warning("the reference has %d frames: its first %d are used", len(video), length)
    return {**size, "num_frames": length}


def motion_of(given: Mapping[str, Any], usual: RunDefaults, has_reference: bool) -> MotionGuidance | None:
    """The guidance: the numbers of the mode that the checkpoint and the preset declare, then the options."""
    numbers = {name[len(MOTION) :]: value for name, value in given.items() if name.startswith(MOTION)}
    mode = given.get("mode") or (DEFAULT_MODE if has_reference else NO_TRANSFER)
    if mode == NO_TRANSFER:
        if numbers:
            raise UsageError(f"--motion-{min(numbers).replace('_', '-')} has no effect in mode {NO_TRANSFER}")
        return None
    scale = numbers.pop("scale", 1.0)
    if not 0 < scale < float("inf"):
        raise UsageError(f"--motion-scale must be above 0; got {scale}")
    guidance = MotionGuidance.for_mode(mode, {**usual.motion.get(mode, {}), **numbers})
    return replace(guidance, lr=tuple(scale * rate for rate in guidance.lr))


def _stem(task: Task, record: RunRecord) -> str:
    name = "text" if task.reference is None else Path(task.reference["path"]).stem
    motion = record.options["motion"]
    return f"{name}-{NO_TRANSFER if motion is None else motion['mode']}-seed{record.options['seed']}"
