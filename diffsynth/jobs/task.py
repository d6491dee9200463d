"""A task is one video to make: from options to the pipeline's run, and from its frames to a file."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffsynth.configs.defaults import EXACT, run_defaults
from diffsynth.configs.descriptors import NO_TRANSFER
from diffsynth.configs.options import DEFAULT_FPS, MOTION_PREFIX, FileOptions, LoadOptions, call_options
from diffsynth.configs.resolve import resolve, resolve_prompts
from diffsynth.data import VideoData
from diffsynth.jobs.errors import UsageError
from diffsynth.jobs.models import attention_kernel
from diffsynth.jobs.publish import publish, reserve_name
from diffsynth.pipelines.denoise import RunEvent
from diffsynth.pipelines.generate import Observer
from diffsynth.pipelines.wan_video import WanVideoPipeline, reference_facts
from diffsynth.runs.checkpoint import LOCK, clear_checkpoints
from diffsynth.runs.record import RunRecord, describe_reference, make_record, record_path

PROMPTS = ("prompt", "negative_prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoTask:
    """One video to make.

    Attributes:
        call: arguments of the pipeline's run, all but input_video and saving.
        video: the reference; None without one.
        reference: its description for the record.
        fps: frames a second of the file.
        quality: of its encoding, 0 to 10.
        output: path of the file; None for a new name in `folder`.
        folder: of a new name.
        overwrite: replace output if it exists.
        saving: arguments of the run that save it as it proceeds.
        job: hash of a batch job, for the record.
    """

    call: Mapping[str, Any]
    video: VideoData | None
    reference: Mapping[str, Any] | None
    fps: float
    quality: float
    output: Path | None = None
    folder: Path = Path()
    overwrite: bool = False
    saving: Mapping[str, Any] = field(default_factory=dict)
    job: str | None = None


def open_reference(path: Path, *, height: int | None = None, width: int | None = None) -> VideoData:
    """Open a reference video, a file or a folder of images; height and width as for `VideoData`."""
    file, folder = (None, path) if path.is_dir() else (path, None)
    return VideoData(video_file=file, image_folder=folder, height=height, width=width)


def task_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some options that `make_task` reads."""
    known = {*PROMPTS, *call_options(), *(item.name for item in fields(FileOptions))}
    return {name: value for name, value in options.items() if name in known or name.startswith(MOTION_PREFIX)}


def with_motion(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in which the numbers of motion, told by MOTION_PREFIX, are gathered in `motion`."""
    numbers = {name for name in options if name.startswith(MOTION_PREFIX) and name not in call_options()}
    gathered = {name: value for name, value in options.items() if name not in numbers}
    if numbers:
        motion = {name.removeprefix(MOTION_PREFIX): options[name] for name in numbers}
        gathered["motion"] = {**gathered.get("motion", {}), **motion}
    return gathered


def make_task(options: Mapping[str, Any], reference: Path | None, folder: Path) -> VideoTask:
    """Return the task that options ask for, checked as far as is possible before the model loads.

    Args:
        options: prompt, negative_prompt, options of the call and of the file by name; numbers of motion in a
            mapping `motion`, or each with the prefix MOTION_PREFIX.
        reference: path of the reference video; None without one.
        folder: of the checkpoint.

    Raises:
        UsageError: an option is missing.
        ValueError, TypeError: an option is not allowed.
        FileNotFoundError: there is no such reference.
    """
    if "prompt" not in options:
        raise UsageError("--prompt is missing: what shall the video show?")
    if reference is None and options.get("mode") != NO_TRANSFER:
        raise UsageError("a reference video is missing; for a video from text alone give --mode No_transfer")
    options, defaults = with_motion(options), run_defaults(folder)
    video = None if reference is None else open_reference(reference)
    call = {name: options[name] for name in call_options() if name in options}
    resolve_prompts(options["prompt"], options.get("negative_prompt"), defaults)
    resolve(call, defaults, reference_facts(video))
    of_file = {item.name: options[item.name] for item in fields(FileOptions) if item.name in options}
    file = FileOptions(**of_file)
    described, rate = None, None
    if reference is not None and video is not None:
        rate = video.fps
        described = describe_reference(reference, len(video), rate)
    return VideoTask(
        call={**{name: options[name] for name in PROMPTS if name in options}, **call},
        video=video,
        reference=described,
        fps=file.fps or rate or defaults["fps"] or DEFAULT_FPS,
        quality=file.quality,
    )


def run_task(
    pipe: WanVideoPipeline,
    task: VideoTask,
    model: Mapping[str, Any],
    loaded: LoadOptions,
    observer: Observer,
) -> tuple[Path, RunRecord]:
    """Make the video and its record.

    Args:
        pipe: the model.
        task: what to make.
        model: its description for the record.
        loaded: how it was loaded.
        observer: called at each stage and step; an error that it raises ends the task. Nothing is written
            before the stage "write".

    Returns:
        The path that the video has, and the record.

    Raises:
        What the pipeline raises, and OSError if the video cannot be written.
    """
    with attention_kernel(loaded):
        (made,) = pipe.run(
            **task.call, **task.saving, input_video=task.video, observer=observer, progress_bar_cmd=iter
        )
    observer(RunEvent(stage="write"))
    frames: Any = made.frames  # PIL images, since a task has no output_type
    record = make_record(
        frames,
        prompt=made.prompt,
        negative_prompt=made.negative_prompt,
        preset=task.call.get("preset", EXACT),
        options=made.options,
        cost=made.cost,
        models=pipe.residency.models,
        device=pipe.device,
        reference=task.reference,
        model=model,
        fps=task.fps,
        quality=task.quality,
        job=task.job,
    )
    if task.output is not None:
        path = publish(frames, task.output, record, overwrite=task.overwrite)
    else:
        name = "text" if task.reference is None else Path(task.reference["path"]).stem
        path = reserve_name(task.folder, f"{name}-{made.options.mode}-seed{made.options.seed}")
        try:
            publish(frames, path, record, overwrite=True)
        except BaseException:
            path.unlink()
            record_path(path).unlink(missing_ok=True)
            raise
    if task.saving:
        _forget(task.saving["checkpoint_dir"], task.output)
    return path, record


def summary(path: Path, record: RunRecord) -> str:
    """Return one line that says what was written and how long it took."""
    video = record.video
    return (
        f"{path}: {video['frames']} frames of {video['width']}x{video['height']} at {video['fps']:g} frames "
        f"a second, seed {record.options['seed']}, {run_seconds(record):.1f} s"
    )


def run_seconds(record: RunRecord) -> float:
    """Return how long a run took, in seconds."""
    return record.cost["time_gen"] + sum(record.cost["stage_seconds"].values())


def saving_folder(output: Path) -> Path:
    """Return the hidden folder beside a video in which its run is saved: out/fox.mp4 -> out/.fox.mp4.run."""
    return output.with_name(f".{output.name}.run")


def _forget(folder: Path, output: Path | None) -> None:
    """Remove the saved state of a run, and its folder too if that is the default one."""
    clear_checkpoints(folder)
    if output is not None and folder == saving_folder(output):
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put something else into it
            folder.rmdir()
