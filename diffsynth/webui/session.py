"""What the web page does with the model: it makes videos and shows the motion of a reference."""

import gc
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffsynth.configs.checkpoints import EMBEDDED, PUBLISHED, checkpoint_folder, published_key
from diffsynth.configs.defaults import RunDefaults, run_defaults
from diffsynth.configs.descriptors import DEFAULT_MODE, NO_TRANSFER, flow_modes
from diffsynth.configs.fields import fields_of
from diffsynth.configs.options import DEFAULT_FPS, LoadOptions, ReferenceOptions, RunOptions, call_options
from diffsynth.configs.resolve import motion_for, resolve
from diffsynth.evaluation.flow_images import save_flow_video
from diffsynth.evaluation.reference_flow import reference_flow
from diffsynth.jobs.download import missing_files
from diffsynth.jobs.models import attention_kernel, choose_model, load_pipeline, parts_of
from diffsynth.jobs.task import make_task, open_reference, run_seconds, run_task
from diffsynth.pipelines.components import reference_facts
from diffsynth.pipelines.denoise import RunEvent
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.planning.cost import run_cost
from diffsynth.planning.plan import resolve_plan
from diffsynth.planning.sizes import ModelSizes, published_sizes
from diffsynth.runs.record import describe_model
from diffsynth.webui.gallery import PastRun, read_runs
from diffsynth.webui.previews import Previews
from diffsynth.webui.queue import QueuedJob
from diffsynth.webui.uploads import UploadLimits, safe_stem

_WORDS = 4  # of the prompt, in a file's name


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A model, the folders of its videos, and the pipeline in memory."""

    folder: Path  # of the checkpoint
    defaults: RunDefaults  # that the checkpoint declares
    sizes: ModelSizes  # of the model, for predictions
    loaded: LoadOptions  # how the model is loaded
    model: Mapping[str, Any]  # facts about it for records
    output_dir: Path  # for finished videos and their references
    cache: Path  # for uploads
    limits: UploadLimits  # of each upload
    memory: dict[Path, tuple[WanVideoPipeline, Previews]]  # by checkpoint; at most one
    max_minutes: float | None = None  # longest predicted run; None without a limit
    pace: float | None = None  # FLOP/s of the device, measured with the first model

    def open(self) -> tuple[WanVideoPipeline, Previews]:
        """Load the model and return it with its previews; only the queue's thread may call this."""
        if self.folder not in self.memory:
            self.memory.clear()  # one model at a time; PyTorch uses its memory again
            gc.collect()
            pipe = load_pipeline(self.folder, self.loaded)
            self.memory[self.folder] = pipe, Previews(pipe)
        return self.memory[self.folder]

    @property
    def references(self) -> Path:
        """Return the folder that keeps the reference videos of runs."""
        return self.output_dir / "references"


def open_session(
    model: str | None,
    models_dir: str | Path,
    loaded: LoadOptions,
    *,
    output_dir: Path,
    cache: Path,
    limits: UploadLimits,
    max_minutes: float | None = None,
) -> Session:
    """Load a model by its name, as `fastvmt transfer --model` does; errors of loading are passed on.

    If max_minutes is set, a short run measures how fast this machine is.
    """
    folder = choose_model(model, models_dir, lambda _note: None)
    pipe = load_pipeline(folder, loaded)
    return Session(
        folder=folder,
        defaults=pipe.defaults,
        sizes=ModelSizes.of(pipe.residency.models),
        loaded=loaded,
        model=describe_model(folder, asdict(loaded)),
        output_dir=output_dir,
        cache=cache,
        limits=limits,
        memory={folder: (pipe, Previews(pipe))},
        max_minutes=max_minutes,
        pace=None if max_minutes is None else _pace(pipe),
    )


def other_sessions(session: Session, models_dir: str | Path) -> Iterator[Session]:
    """Yield sessions of the other complete models and the embedded ones; none of them is loaded yet."""
    fits_one = session.loaded.loras or parts_of(session.loaded)
    published = [Path(models_dir) / checkpoint.folder for checkpoint in PUBLISHED.values()]
    for folder in () if fits_one else (*published, *map(checkpoint_folder, EMBEDDED)):
        key = published_key(folder)
        if folder.name != session.folder.name and not (key and missing_files(folder, PUBLISHED[key])):
            models = {} if key else load_pipeline(folder, LoadOptions(device="cpu")).residency.models
            sizes = published_sizes(key) if key else ModelSizes.of(models)
            model = describe_model(folder, asdict(session.loaded))
            yield replace(session, folder=folder, defaults=run_defaults(folder), sizes=sizes, model=model)


def _pace(pipe: WanVideoPipeline) -> float:
    """Measure the speed of a run with one step and a few frames, in FLOP/s."""
    call = {"num_frames": 5, "num_inference_steps": 1, "mode": NO_TRANSFER, "output_type": "latent"}
    (made,) = pipe.run("a", progress_bar_cmd=None, **call)  # type: ignore[arg-type]  # a mapping
    return _operations(ModelSizes.of(pipe.residency.models), made.options) / made.cost.time_gen


def _operations(sizes: ModelSizes, run: RunOptions) -> float:
    return run_cost(sizes.dit, sizes.latent_shape(run.height, run.width, run.num_frames), run).flops


def check_budget(
    session: Session, request: Mapping[str, Any], reference: Path | None, *, beside: bool = False
) -> None:
    """Raise ValueError if a request's run, and one without transfer beside it, exceed session.max_minutes."""
    if session.max_minutes is None:
        return
    run = _resolved(session, request, reference)
    runs = (run, replace(run, motion=None)) if beside else (run,)
    minutes = sum(expected_minutes(session, one) or 0.0 for one in runs)
    if minutes > session.max_minutes:
        raise ValueError(
            f"this run would take about {minutes:.3g} minutes, and {session.max_minutes:g} are the limit "
            "here: ask for fewer frames, fewer steps or a smaller size"
        )


def expected_minutes(session: Session, run: RunOptions) -> float | None:
    """Estimate a run's minutes by this model's newest run, else the measured pace; None without either."""
    pace = session.pace
    for past in read_runs(session.output_dir):
        if past.record.model["folder"] == session.model["folder"]:
            with suppress(ValueError, TypeError):  # from a version with other options
                made = RunOptions.from_json(past.record.options)
                pace = _operations(session.sizes, made) / run_seconds(past.record)
            break
    return None if pace is None else _operations(session.sizes, run) / pace / 60


def planned(session: Session, request: Mapping[str, Any]) -> RunOptions:
    """Return the options of a request whose reference is not read: it has the video's size and length."""
    call = {name: value for name, value in request.items() if name in call_options()}
    return resolve_plan(call, session.defaults, session.sizes.facts())


def _resolved(
    session: Session, request: Mapping[str, Any], reference: Path | None, **changes: Any
) -> RunOptions:
    """Return the resolved options of a request in which `changes` replace options of the call."""
    call = {name: value for name, value in request.items() if name in call_options()} | changes
    if reference is None:
        return resolve(call, session.defaults, None, session.sizes.facts())
    with open_reference(reference, fields_of(ReferenceOptions, request)) as video:
        return resolve(call, session.defaults, reference_facts(video), session.sizes.facts())


def make_video(
    session: Session,
    request: Mapping[str, Any],
    reference: Path | None,
    job: QueuedJob,
    pictures: Mapping[str, Path] | None = None,
) -> PastRun:
    """Make the video and write it with its record; nothing is written if the job is cancelled or fails."""
    if reference is None and request["mode"] != NO_TRANSFER:
        raise ValueError("upload a reference video, or choose the mode without transfer")
    session.output_dir.mkdir(parents=True, exist_ok=True)  # it may have been deleted since
    words = safe_stem(" ".join(request["prompt"].lower().split()[:_WORDS]), "video")
    source = "" if reference is None else f"-{reference.stem.rsplit('-', 1)[0]}"  # without its hash
    task = make_task(request, reference, session.folder, pictures)
    task = replace(task, folder=session.output_dir, stem=words + source)

    job.report(stage="load the model")
    pipe, previews = session.open()

    def observe(event: RunEvent) -> None:
        job.check()
        before = job.progress
        if event.steps == 0:
            job.report(stage=event.stage)
        elif event.stage == "guidance":
            losses = before.losses
            if len(event.losses) > 1 and event.losses[0]:
                losses += (event.losses[-1] / event.losses[0],)
            job.report(stage=event.stage, guided=event.step, guided_steps=event.steps, losses=losses)
        else:
            preview = previews.of(event) or before.preview
            job.report(stage=event.stage, step=event.step, steps=event.steps, preview=preview)

    video, record, *_ = run_task(pipe, task, session.model, session.loaded, observe, job.stop)
    return PastRun(video=video, record=record)


def show_motion(session: Session, request: Mapping[str, Any], reference: Path, job: QueuedJob) -> Path:
    """Render the flow that a request would transfer to a video file in the cache, and return its path."""
    mode = request["mode"] if request["mode"] in flow_modes() else DEFAULT_MODE
    used = fields_of(ReferenceOptions, request)
    run = _resolved(session, request, reference, mode=mode)
    motion = motion_for(session.folder, mode)
    asked = f"{reference.name} {run.height} {run.width} {run.num_frames} {motion} {used}"
    path = session.cache / f"motion-{hashlib.sha256(asked.encode()).hexdigest()[:20]}.mp4"
    if path.is_file():
        return path
    job.report(stage="read the motion")
    sized = open_reference(reference, used, height=run.height, width=run.width)
    with sized as video, attention_kernel(session.loaded):
        video.set_length(run.num_frames)
        flow = reference_flow(session.open()[0], video, motion=motion)
        return save_flow_video(flow, path, sf=motion.sf, frames=video, fps=video.fps or DEFAULT_FPS)
