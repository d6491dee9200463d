"""A task is one video to make: options become a run of the pipeline, and its frames become a file."""

import hashlib
import json
import math
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from diffsynth.configs.defaults import EXACT, run_defaults
from diffsynth.configs.fields import fields_of, options_of
from diffsynth.configs.options import (
    DEFAULT_FPS,
    MOTION_PREFIX,
    FileOptions,
    LoadOptions,
    ReferenceOptions,
    call_options,
)
from diffsynth.configs.resolve import resolve, resolve_prompts
from diffsynth.data import VideoData
from diffsynth.data.ffmpeg import check_ffmpeg
from diffsynth.data.tensors import chunks_to_uint8
from diffsynth.jobs.early import check_request
from diffsynth.jobs.errors import RunFailedError, UsageError
from diffsynth.jobs.models import attention_kernel
from diffsynth.jobs.publish import publish
from diffsynth.pipelines.components import reference_facts
from diffsynth.pipelines.denoise import RunEvent
from diffsynth.pipelines.generate import Observer
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.runs.checkpoint import LOCK, clear_checkpoints
from diffsynth.runs.latents import keep_latents, latents_facts, latents_until_done
from diffsynth.runs.record import (
    RunRecord,
    describe_pictures,
    describe_reference,
    differences,
    finished_record,
    make_record,
)

PROMPTS = ("prompt", "negative_prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoTask:
    """One video to make.

    Attributes:
        call: arguments of the pipeline's run, except for the reference, the pictures and `saving`.
        video: the reference video; None without one.
        reference: description of the reference for the record.
        pictures: descriptions of the pictures for the record; the keys are input_image and end_image, if set.
        file: how the frames are written, with `fps` resolved.
        size: number, height and width of the frames.
        output: path of the video file; None to make a new name in `folder`.
        folder: folder of the video file if `output` is None.
        stem: beginning of that file's name; None for one of the reference and the mode.
        overwrite: whether to replace `output` if it exists.
        saving: arguments of the run that save its progress; empty if it is not saved.
        job: hash of the request, for the record.
    """

    call: Mapping[str, Any]
    video: VideoData | None
    reference: Mapping[str, Any] | None
    file: FileOptions
    size: tuple[int, int, int]
    output: Path | None = None
    folder: Path = Path()
    stem: str | None = None
    overwrite: bool = False
    saving: Mapping[str, Any] = field(default_factory=dict)
    job: str | None = None
    pictures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's run, apart from callbacks."""
        pictures = {name: picture["path"] for name, picture in self.pictures.items()}
        return {**self.call, **self.saving, **pictures, "input_video": self.video}

    @property
    def num_bytes(self) -> int:
        """Return the size of the video's frames in memory, in bytes."""
        return 3 * math.prod(self.size)


class MadeVideo(NamedTuple):
    """A written video.

    Attributes:
        path: path of the video file.
        record: record of the run.
        frames: frames of the video.
        reference: frames of the reference as the model saw them, uint8 [T, H, W, 3]; None if unknown.
    """

    path: Path
    record: RunRecord
    frames: list[Image.Image]
    reference: np.ndarray | None = None


def open_reference(
    path: Path, used: ReferenceOptions | None = None, *, height: int | None = None, width: int | None = None
) -> VideoData:
    """Open a reference video, a file or a folder of images."""
    file, folder = (None, path) if path.is_dir() else (path, None)
    used = used or ReferenceOptions()
    part: dict[str, Any] = {"fps": used.ref_fps, "start": used.start, "end": used.end, "fit": used.fit}
    return VideoData(file, folder, height, width, **part)


def use_reference(
    path: Path | None, used: ReferenceOptions
) -> tuple[VideoData | None, dict[str, Any] | None]:
    """Open a reference and return it with its description for the record; both are None without one."""
    if path is None or path.is_dir():  # opening a video file runs ffmpeg anyway
        check_ffmpeg()
    if path is None:
        return None, None
    video = open_reference(path, used)
    return video, describe_reference(path, len(video), video.fps, used)


def task_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the subset of options that `make_task` reads."""
    known = {*PROMPTS, *call_options(), *options_of(FileOptions), *options_of(ReferenceOptions)}
    return {name: value for name, value in options.items() if name in known or name.startswith(MOTION_PREFIX)}


def with_motion(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in which entries that begin with MOTION_PREFIX are moved into the mapping `motion`."""
    numbers = {name for name in options if name.startswith(MOTION_PREFIX) and name not in call_options()}
    gathered = {name: value for name, value in options.items() if name not in numbers}
    if numbers:
        motion = {name.removeprefix(MOTION_PREFIX): options[name] for name in numbers}
        gathered["motion"] = {**gathered.get("motion", {}), **motion}
    return gathered


def make_task(
    options: Mapping[str, Any],
    reference: Path | None,
    folder: Path,
    pictures: Mapping[str, Path] | None = None,
) -> VideoTask:
    """Return the task that options describe, validated as far as possible before the model is loaded.

    Options are, by name, the prompts and those of the call, the reference and the file; numbers of motion are
    in a mapping `motion`, or have the prefix MOTION_PREFIX. The keys of pictures are input_image and
    end_image, if set. The folder is the checkpoint's.

    Raises:
        UsageError: an option is missing.
        ValueError, TypeError: an option is not allowed.
        FileNotFoundError: there is no such reference or picture.
        FfmpegError: ffmpeg does not run.
    """
    check_request(options, reference, bool(pictures))
    options, defaults = {"prompt": "", **with_motion(options)}, run_defaults(folder)
    file = fields_of(FileOptions, options)
    call = {name: options[name] for name in call_options() if name in options}
    resolve_prompts(options["prompt"], options.get("negative_prompt"), defaults)
    video, described = use_reference(reference, fields_of(ReferenceOptions, options))
    run = resolve(call, defaults, reference_facts(video))
    rate = None if video is None else video.fps
    return VideoTask(
        call={**{name: options[name] for name in PROMPTS if name in options}, **call},
        video=video,
        reference=described,
        file=replace(file, fps=file.fps or rate or defaults["fps"] or DEFAULT_FPS),
        size=run.size,
        pictures=describe_pictures(pictures or {}),
    )


def request_hash(options: Mapping[str, Any], task: VideoTask, model: Mapping[str, Any]) -> str:
    """Return the hash that identifies a request: its options, reference, model files, LoRAs and dtypes.

    Options of device and memory for the model do not count, so that another machine may continue the run.
    """
    facts = {
        "given": dict(options),
        "reference": task.reference and task.reference["sha256"],
        "model": {name: file["bytes"] for name, file in model["files"].items()},
        "types": [model["setup"][name] for name in ("dtype", "vae_dtype")],
    }
    if model["setup"].get("loras"):  # absent otherwise, so that requests without them keep their hash
        facts["loras"] = model["setup"]["loras"]
    facts |= {name: picture["sha256"] for name, picture in task.pictures.items()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def was_made(task: VideoTask, model: Mapping[str, Any]) -> bool:
    """Return whether the output of a task exists, is complete, and was made by the same request.

    Raises:
        UsageError: another request made the output, or it is damaged, and overwriting is off; the message
            says what differs.
    """
    assert task.output is not None
    try:
        finished = finished_record(task.output)
    except ValueError as error:
        if task.overwrite:
            return False
        raise UsageError(f"{error}; --overwrite makes it again") from error
    if finished is None:
        return False
    found = differences(finished, task.reference, model, task.pictures)
    if finished.job == task.job and not found:
        return True
    if task.overwrite:
        return False
    then = {"prompt": finished.prompt, "negative_prompt": finished.negative_prompt, **finished.options}
    asked = dict(task.call)
    for options in (then, asked):
        if isinstance(numbers := options.pop("motion", None), Mapping):
            options |= {MOTION_PREFIX + name: value for name, value in numbers.items()}
    for name, value in json.loads(json.dumps(asked, default=repr)).items():
        if name in then and then[name] != value:
            found.append(f"{name} was {then[name]!r:.80}, and is {value!r:.80}")
    what = f" ({'; '.join(found)})" if found else ""
    raise UsageError(f"{task.output} exists, made by another request{what}; name another or --overwrite")


def run_task(
    pipe: WanVideoPipeline,
    task: VideoTask,
    model: Mapping[str, Any],
    loaded: LoadOptions,
    observer: Observer,
    stop: threading.Event,
) -> MadeVideo:
    """Make the video and its record.

    An error that the observer raises ends the task; no video is written before the stage "write". Once `stop`
    is set, denoising ends, and the observer can raise when decoding begins.

    Raises:
        RunFailedError: the video cannot be written; the error's `latents_path` names the kept latents.
        Errors of the pipeline are raised as they are.
    """
    # Found again when the same command runs again, also where a seed that is drawn becomes part of its name.
    place = task.output or task.folder / f"{task.stem or reference_stem(task)}.mp4"
    last: list[Tensor] = []
    seen: np.ndarray | None = None

    def watch(event: RunEvent) -> None:
        nonlocal seen
        if event.reference is not None:
            seen = chunks_to_uint8([event.reference], event.reference.shape[2])
        if event.stage == "sampling" and event.step == event.steps and event.latents is not None:
            last[:] = [event.latents]
        elif event.stage == "decode" and last and not task.saving:  # a saved run keeps them itself
            keep(last[0], latents_facts(pipe.vae, task.size, task.file.fps))
        observer(event)

    with latents_until_done(place, task.output, task.job) as keep:
        with attention_kernel(loaded):
            (made,) = pipe.run(**task.arguments, observer=watch, stop=stop, progress_bar_cmd=iter)
        observer(RunEvent(stage="write"))
        frames: Any = made.frames  # PIL images, since a task has no output_type
        record = make_record(
            frames, prompt=made.prompt, negative_prompt=made.negative_prompt, options=made.options,
            cost=made.cost, preset=task.call.get("preset", EXACT), models=pipe.residency.models,
            device=pipe.device, reference=task.reference, model=model, file=task.file, job=task.job,
            pictures=task.pictures,
        )  # fmt: skip
        name = f"{task.stem or f'{reference_stem(task)}-{made.options.mode}'}-seed{made.options.seed}"
        try:
            output = task.output or task.folder / f"{name}.mp4"
            path = publish(frames, output, record, overwrite=task.overwrite)
        except (OSError, RuntimeError) as error:
            facts = latents_facts(pipe.vae, task.size, task.file.fps, made.cost)
            failed = RunFailedError(f"the video could not be written: {error}")
            keep_latents(made.latents, facts, failed, output)
            raise failed from error
    forget_run(task)
    return MadeVideo(path, record, frames, seen)


def reference_stem(task: VideoTask) -> str:
    """Return the beginning of a video's default file name: the reference's stem, or "text" without one."""
    return "text" if task.reference is None else Path(task.reference["path"]).stem


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


def forget_run(task: VideoTask) -> None:
    """Remove the saved state of a task's run, if it is saved, and its folder too if it is the default one."""
    if not task.saving:
        return
    folder: Path = task.saving["checkpoint_dir"]
    clear_checkpoints(folder)
    if task.output is not None and folder == saving_folder(task.output):
        (folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # the folder has other files in it
            folder.rmdir()
