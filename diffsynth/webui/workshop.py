"""What the page does with the model: makes videos, and shows the motion of a reference."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth.cli.console import Console
from diffsynth.cli.models import Setup, choose_model, is_published, load_pipeline
from diffsynth.cli.outputs import publish, reserve_name
from diffsynth.cli.tasks import DEFAULT_FPS, Task, make_task
from diffsynth.configs.defaults import EXACT
from diffsynth.data import VideoData
from diffsynth.evaluation.flow_images import save_flow_video
from diffsynth.evaluation.reference_flow import reference_flow
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.arguments import video_length, video_size
from diffsynth.pipelines.events import RunEvent
from diffsynth.pipelines.guidance import DEFAULT_MODE, NO_TRANSFER
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.runs.record import describe_model, make_record, record_path
from diffsynth.webui.gallery import PastRun
from diffsynth.webui.jobs import Job
from diffsynth.webui.previews import Previews
from diffsynth.webui.requests import Request
from diffsynth.webui.uploads import UploadLimits

# Modes whose guidance has a flow to look at.
FLOW_MODES = ("effi_AMF", "AMF")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workshop:
    """A loaded model and where its videos go.

    folder: of the checkpoint; published: made for 480x832 pixels and 81 frames. setup, model: for the record.
    output_dir: of videos and records, with the references of runs in references/. cache: of what the page
    shows and what was uploaded; may be lost.
    """

    pipe: WanVideoPipeline
    folder: Path
    published: bool
    setup: Setup
    model: Mapping[str, Any]
    output_dir: Path
    cache: Path
    limits: UploadLimits
    previews: Previews

    @property
    def references(self) -> Path:
        return self.output_dir / "references"


def open_workshop(
    model: str | None,
    models_dir: str | Path,
    setup: Setup,
    *,
    output_dir: Path,
    cache: Path,
    limits: UploadLimits,
    hashed: bool = True,
) -> Workshop:
    """Load a model, found as `fastvmt transfer --model` does. Raises what loading raises, and OSError if the
    output folder cannot be written to.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "references").mkdir(exist_ok=True)
    folder = choose_model(model, models_dir, Console())
    pipe = load_pipeline(folder, setup)
    return Workshop(
        pipe=pipe,
        folder=folder,
        published=is_published(folder),
        setup=setup,
        model=describe_model(folder, setup.to_json(), hashed),
        output_dir=output_dir,
        cache=cache,
        limits=limits,
        previews=Previews(pipe),
    )


def task_of(shop: Workshop, request: Request, reference: Path | None) -> Task:
    """What the request comes to with this model. Raises ValueError for what it cannot do."""
    if reference is None and request.mode != NO_TRANSFER:
        raise ValueError("upload a reference video, or choose the mode without transfer")
    return make_task(request.given(), reference, shop.pipe.defaults, shop.published)


def make_video(shop: Workshop, request: Request, reference: Path | None, job: Job) -> PastRun:
    """Make the video and write it with its record; nothing is written if the job is cancelled or fails."""
    pipe, task = shop.pipe, task_of(shop, request, reference)
    with job.interruptible(pipe.interrupt), shop.setup.attention_kernel():
        observer = Watch(job, shop.previews)
        frames = pipe(**task.call, input_video=task.video, observer=observer, progress_bar_cmd=iter)
    job.check()
    job.report(stage="write")
    record = make_record(
        pipe,
        frames,
        prompt=request.prompt,
        negative_prompt=task.call.get("negative_prompt", ""),
        preset=task.call.get("preset", EXACT),
        reference=task.reference,
        model=shop.model,
        fps=task.fps,
        quality=task.quality,
    )
    stem = "text" if reference is None else reference.stem
    path = reserve_name(shop.output_dir, f"{stem}-{request.mode}-seed{record.options['seed']}")
    try:
        publish(frames, path, record, fps=task.fps, quality=task.quality, overwrite=True)
    except BaseException:
        path.unlink()
        record_path(path).unlink(missing_ok=True)
        raise
    return PastRun(video=path, record=record)


def show_motion(shop: Workshop, request: Request, reference: Path, job: Job) -> Path:
    """A video in the cache of the flow that the request would transfer: arrows over frames, colours."""
    mode = request.mode if request.mode in FLOW_MODES else DEFAULT_MODE
    usual = shop.pipe.defaults
    call = task_of(shop, request, reference).call
    with VideoData(reference) as video:
        height, width = video_size(call.get("height"), call.get("width"), usual, video)
        length = video_length(call.get("num_frames"), usual, video)
    motion = MotionGuidance.for_checkpoint(shop.folder, mode)
    asked = f"{reference.name} {height} {width} {length} {motion}"
    path = shop.cache / f"motion-{hashlib.sha256(asked.encode()).hexdigest()[:20]}.mp4"
    if path.is_file():
        return path
    job.report(stage="read the motion")
    with VideoData(reference, height=height, width=width) as video, shop.setup.attention_kernel():
        video.set_length(length)
        flow = reference_flow(shop.pipe, video, motion=motion)
        return save_flow_video(flow, path, sf=motion.sf, frames=video, fps=video.fps or DEFAULT_FPS)


class Watch:
    """An observer that tells a job how far its run is, and ends the run once the job is cancelled."""

    def __init__(self, job: Job, previews: Previews) -> None:
        self._job, self._previews = job, previews

    def __call__(self, event: RunEvent) -> None:
        self._job.check()
        before = self._job.progress
        if event.steps == 0:
            self._job.report(stage=event.stage)
        elif event.stage == "guidance":
            losses = before.losses + event.losses[-1:]
            self._job.report(stage=event.stage, guided=event.step, guided_steps=event.steps, losses=losses)
        else:
            preview = self._previews.of(event) or before.preview
            self._job.report(stage=event.stage, step=event.step, steps=event.steps, preview=preview)
