"""The page: its layout, and the handlers of its buttons."""

import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from itertools import cycle
from pathlib import Path
from typing import Any

from diffsynth.configs.defaults import EXACT, RunDefaults
from diffsynth.configs.descriptors import DEFAULT_MODE, NO_TRANSFER
from diffsynth.configs.options import FITS, MODES, PICTURES
from diffsynth.configs.resolve import unknown_words
from diffsynth.webui import panel
from diffsynth.webui.gallery import PastRun, compared, find_run, past_runs, poster
from diffsynth.webui.queue import JobCancelledError, JobQueue, QueuedJob
from diffsynth.webui.requests import checked_request
from diffsynth.webui.security import Guard
from diffsynth.webui.session import Session, check_budget, expected_minutes, make_video, planned, show_motion
from diffsynth.webui.uploads import keep_picture, keep_upload

logger = logging.getLogger(__name__)

# Reference clips to choose from: those of the clone, which are inside an installed package.
_PACKAGE = Path(__file__).resolve().parent.parent
CLIP_FOLDERS = (_PACKAGE / "embedded" / "data", _PACKAGE.parent / "examples" / "data")
LOOKS_PER_SECOND = 4
VISITORS = 40  # pages that are served at a time; their runs wait in one queue
# The options that the page has, in its order.
_FIELDS = (
    "prompt", "negative_prompt", "preset", "mode", "seed", "denoising_strength", "num_inference_steps",
    "motion_scale", "height", "width", "num_frames", "start", "end", "ref_fps", "fit",
)  # fmt: skip
# A field for numbers is never empty: these values leave the choice to the model or the preset.
_UNSET = {"seed": -1} | dict.fromkeys(
    ("num_inference_steps", "height", "width", "num_frames", "start", "end", "ref_fps"), 0
)
_NUMBERS = {"Steps": "num_inference_steps", "Height": "height", "Width": "width", "Frames": "num_frames"}
_PRESETS = "exact: the full method; balanced and fast: less computation, a little less likeness"
# Prompts to try: of shapes for a model that knows few words.
_SHAPES = (
    "a blue star on a yellow background", "a red square on a white background",
    "a yellow triangle on a blue background", "a green circle on a black background",
)  # fmt: skip
_SCENES = (
    "a red fox leaps through fresh snow", "a paper boat on a stormy sea", "an astronaut on a beach at sunset",
    "a hot-air balloon over lavender fields",
)  # fmt: skip
_MODES = "effi_AMF: FastVMT; AMF: the same over whole frames; FlowMotion: no backward pass; No_transfer: text"


def import_gradio() -> Any:
    """Return gradio, set to send nothing to other hosts; an ImportError has the command that installs it."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the web page needs gradio: pip install 'fastvmt[ui]'") from error
    return gradio


class Page:
    """Handlers of the page's buttons, for one session and one queue.

    `shared`: every visitor sees all past runs, not the own ones alone. Who opens the page with ?owner= and
    the `owner_key` sees all runs and may cancel any.
    """

    def __init__(self, session: Session, queue: JobQueue, *, shared: bool = True) -> None:
        self.session, self.queue, self.shared = session, queue, shared
        self.owner_key = secrets.token_urlsafe(16)
        self._gradio = import_gradio()
        clips = sorted(path for folder in CLIP_FOLDERS for path in folder.glob("*.mp4"))
        self.clips = [self._shown(path) for path in clips]

    def generate(self, uploaded: str | None, *values: Any) -> Iterator[tuple]:
        """Yield progress of a run until it ends: panel, id of the job, videos, files, gallery."""

        *options, picture, seen = values

        def start() -> QueuedJob:
            request = self._request(options)
            reference = None
            if uploaded is not None and request["mode"] != NO_TRANSFER:
                reference = self._kept(uploaded)
            pictures = {} if picture is None else {PICTURES[0]: self._kept(picture, keep_picture)}
            check_budget(self.session, request, reference)
            if ignored := unknown_words([request["prompt"]], self.session.pipe.defaults.words):
                self._gradio.Warning(ignored)
            return self.queue.submit(
                lambda job: make_video(self.session, request, reference, job, pictures), request["prompt"]
            )

        def show(run: PastRun) -> tuple:
            names = None if seen is None else [*seen, run.video.name]
            return (*self._files_of(run), self.gallery(names), names)

        yield from self._follow(start, show, num_shown=5)

    def inspect(self, uploaded: str | None, *values: Any) -> Iterator[tuple]:
        """Yield progress of reading a reference's motion: panel, id of the job, video of the motion."""

        def start() -> QueuedJob:
            if uploaded is None:
                raise ValueError("choose or upload a reference video first")
            # The prompt has no influence on a reference's motion, but it must not be empty.
            request, reference = self._request(("motion", *values[1:])), self._kept(uploaded)
            check_budget(self.session, request, reference)
            return self.queue.submit(
                lambda job: show_motion(self.session, request, reference, job), "its motion"
            )

        def show(path: Path) -> tuple[str, str]:
            return panel.message("Colours and arrows: where it moves, and how far.", "done"), str(path)

        yield from self._follow(start, show, num_shown=1)

    def expected(self, *values: Any) -> str:
        """Return how long a run would take; empty if the values are refused. No reference is read for it."""
        try:
            run = planned(self.session, self._request(("a run", *values[1:])))
            minutes = expected_minutes(self.session, run)
        except (ValueError, TypeError):
            return ""
        if minutes is None:
            return "The first run tells how long others take."
        about = f"{60 * minutes:.0f} s" if minutes < 2 else f"{minutes:.0f} minutes"
        return f"It takes about {about}, less if the reference is short."

    def cancel(self, job_id: str | None) -> str | Any:
        """Ask the visitor's run to stop, and return the panel."""
        if self.queue.cancel(job_id):
            return panel.message("Stopping after this step.")
        return self._gradio.skip()

    def enter(self, request: Any) -> tuple:
        """Return which past runs a visitor may see (None: all), the gallery, and what the owner alone has."""
        is_owner = secrets.compare_digest(request.query_params.get("owner", ""), self.owner_key)
        seen: list[str] | None = None if is_owner or self.shared else []
        return seen, self.gallery(seen), is_owner, self._gradio.update(visible=is_owner)

    def all_runs(self, is_owner: bool) -> Any:
        """Return the choice of runs that wait and run, for the owner."""
        jobs = self.queue.unfinished() if is_owner else []
        return self._gradio.update(
            choices=[(f"{job.state}, {job.seconds:.0f} s: {job.title[:60]}", job.id) for job in jobs]
        )

    def gallery(self, seen: Sequence[str] | None) -> list[tuple[str, str]]:
        """Return posters and names of past runs, of all of them if `seen` is None."""
        shown = []
        for run in past_runs(self.session.output_dir):
            if seen is None or run.video.name in seen:
                try:
                    shown.append((str(poster(run, self.session.cache)), run.video.name))
                except (OSError, ValueError) as error:
                    logger.warning("%s is left out of the gallery: %s", run.video, error)
        return shown

    def open_past(self, name: str, seen: Sequence[str] | None) -> tuple:
        """Return panel, videos and files of the past run of that name, if the visitor may see it."""
        try:
            if seen is not None and name not in seen:
                raise ValueError("that run is not yours")
            return self._files_of(find_run(self.session.output_dir, name))
        except (ValueError, OSError) as error:
            return (self._bare(panel.failed(error)), *[self._gradio.skip()] * 3)

    def _request(self, values: Sequence[Any]) -> dict[str, Any]:
        asked = dict(zip(_FIELDS, values, strict=True))
        return checked_request(
            {name: v for name, v in asked.items() if v is not None and v != _UNSET.get(name)}
        )

    def _kept(self, uploaded: str, keep: Callable[..., Path] = keep_upload) -> Path:
        arrived = Path(os.environ["GRADIO_TEMP_DIR"])
        return keep(uploaded, arrived, self.session.references, self.session.limits)

    def _follow(
        self, start: Callable[[], QueuedJob], show: Callable[[Any], tuple], num_shown: int
    ) -> Iterator[tuple]:
        """Queue a job, and yield (panel, job id, *shown outputs) several times a second until it ends."""
        unchanged = [self._gradio.skip()] * num_shown
        try:
            job = start()
            while not job.future.done():
                job.followed()
                ahead = self.queue.ahead(job)
                yield (panel.running(job.progress, job.state, ahead, job.seconds), job.id, *unchanged)
                time.sleep(1 / LOOKS_PER_SECOND)
            error = job.error()
            status, *shown = (None, *unchanged) if error else show(job.result())
        except (ValueError, TypeError, RuntimeError, OSError) as problem:
            error, shown = problem, unchanged
        if isinstance(error, JobCancelledError | CancelledError):
            status = panel.message("Cancelled; nothing was written.")
        elif error is not None:
            status = self._bare(panel.failed(error))
        yield (status, None, *shown)
        if error is not None:  # so that a program that calls this page sees no success
            raise self._gradio.Error(self._bare(str(error)) or type(error).__name__, print_exception=False)

    def _bare(self, text: str) -> str:
        """Return a text for visitors, in which files of the server have their names alone."""
        folders = map(re.escape, map(str, (self.session.output_dir, self.session.cache.parent)))
        return re.sub(rf"({'|'.join(folders)})[/\\]([\w.-]+[/\\])*", "", text)

    def _files_of(self, run: PastRun) -> tuple:
        video, both = self._shown(run.video), str(compared(run, self.session.cache))
        return panel.finished(run), both, video, [video, self._shown(run.record_file)]

    def _shown(self, path: Path) -> str:
        """Return the path of a copy in the cache, the only folder that the server serves."""
        return self._gradio.processing_utils.save_file_to_cache(path, str(self.session.cache))


def build(page: Page) -> Any:
    """Return the gradio Blocks of the page."""
    gr, session = import_gradio(), page.session
    defaults = session.pipe.defaults
    with gr.Blocks(title="FastVMT", analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(f"<h1>FastVMT</h1><p>A video's motion, a prompt's content. Model: {session.folder.name}</p>")
        job_id, seen, is_owner = gr.State(None), gr.State([]), gr.State(value=False)
        with gr.Row():
            with gr.Column(scale=2):
                prompts = _SHAPES if defaults.words else _SCENES
                prompt = gr.Textbox(label="Prompt", lines=2, placeholder=prompts[0], elem_id="prompt")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go")
                    stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
                expected = gr.HTML(elem_id="expected")
                reference = gr.Video(label="Reference", sources=["upload"], height=200, elem_id="reference")
                look = gr.Button("Show the motion", elem_id="look")
                tries = [list(example) for example in zip(page.clips, cycle(prompts), strict=False)]
                gr.Examples(tries, [reference, prompt], label="Try one of these", elem_id="examples")
                picture = gr.Image(
                    label="Picture that the video begins with",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=240,
                    elem_id="picture",
                    visible=session.pipe.models.takes_picture,
                )
                preset = gr.Radio(
                    [EXACT, *defaults.presets], value=EXACT, label="Preset", info=_PRESETS, elem_id="preset"
                )
                with gr.Row():
                    mode = gr.Dropdown(
                        list(MODES), value=DEFAULT_MODE, label="Mode", info=_MODES, elem_id="mode"
                    )
                    seed = gr.Number(-1, precision=0, label="Seed (-1: a new one)", elem_id="seed")
                negative, strength, scale, numbers, part = _more(gr, defaults)
            with gr.Column(scale=3):
                status = gr.HTML(panel.IDLE, elem_id="panel")
                plays = {"interactive": False, "loop": True, "autoplay": True}
                both = gr.Video(label="Reference | result", show_label=False, **plays)
                with gr.Row():
                    result = gr.Video(label="Result", elem_id="result", height=280, **plays)
                    motion = gr.Video(label="Motion", elem_id="motion", height=280, **plays)
                files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
        past = gr.Gallery(
            label="Past runs", columns=8, fit_columns=False, allow_preview=False, elem_id="past"
        )
        owners = _owners_row(gr, page, is_owner, status)
        asked = [prompt, negative, preset, mode, seed, strength, numbers[0], scale, *numbers[1:], *part]
        shown = [both, result, files]
        many = {"concurrency_limit": VISITORS, "show_progress": "hidden"}
        made = [status, job_id, *shown, past, seen]
        counted = [preset, mode, *numbers, *part, past]
        gr.on([field.change for field in counted], page.expected, asked, expected, api_name=False)
        go.click(page.generate, [reference, *asked, picture, seen], made, api_name="generate", **many)
        look.click(page.inspect, [reference, *asked], [status, job_id, motion], api_name="inspect", **many)
        stop.click(page.cancel, job_id, status, api_name="cancel", queue=False)

        def open_past(names: list[str] | None, event: Any) -> tuple:
            return page.open_past(event.value["caption"], names)

        open_past.__annotations__["event"] = gr.SelectData  # by which gradio knows what to pass
        Page.enter.__annotations__["request"] = gr.Request
        past.select(open_past, seen, [status, *shown], api_name=False)
        demo.load(page.enter, None, [seen, past, is_owner, owners], api_name=False)
    return demo.queue(max_size=4 * VISITORS)


def _owners_row(gr: Any, page: Page, is_owner: Any, status: Any) -> Any:
    """Return the row by which who runs the page cancels any run."""
    with gr.Row(visible=False) as row:
        run = gr.Dropdown([], label="Runs of all visitors", elem_id="runs")
        again, end = gr.Button("Look again", elem_id="again"), gr.Button("Cancel that run", elem_id="end")
    hidden = {"api_name": False, "queue": False}
    again.click(page.all_runs, is_owner, run, **hidden)
    end.click(lambda job, is_owner: page.cancel(job if is_owner else None), [run, is_owner], status, **hidden)
    return row


def _more(gr: Any, defaults: RunDefaults) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """Return the fields that most visitors leave alone: negative prompt, two strengths, sizes, the part."""
    with gr.Accordion("More (0: the model's own)", open=False):
        negative = gr.Textbox(label="Negative prompt", elem_id="negative")
        with gr.Row():
            strength = gr.Slider(0.05, 1, value=defaults["denoising_strength"], label="Denoising strength")
            scale = gr.Slider(0.1, 4, value=1, label="Strength of the motion")
        with gr.Row():
            numbers = [
                gr.Number(0, precision=0, label=f"{name} (0: {defaults[key]})", elem_id=name.lower())
                for name, key in _NUMBERS.items()
            ]
        with gr.Row():
            labels = {"start": "Reference from second", "end": "to second", "ref_fps": "at frames a second"}
            part = [gr.Number(0, label=label, elem_id=name) for name, label in labels.items()]
            part.append(gr.Dropdown(list(FITS), value="crop", label="Fit", elem_id="fit"))
    return negative, strength, scale, numbers, part


def make_app(
    page: Page,
    auth: tuple[str, str] | None = None,
    root_path: str | None = None,
    *,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
) -> Guard:
    """Return the server's application."""
    gr = import_gradio()
    from fastapi import FastAPI

    cache, megabytes = page.session.cache, page.session.limits.megabytes
    local = ("ui-sans-serif", "system-ui", "sans-serif")
    demo = build(page)
    demo.has_launched = True  # gradio checks the paths of files only in an app that it has launched itself
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        demo,
        path="/",
        auth=auth,
        root_path=root_path,
        allowed_paths=[str(cache)],
        max_file_size=f"{megabytes:g}mb",
        footer_links=[],
        theme=gr.themes.Soft(font=local, font_mono=("ui-monospace", "monospace")),
        css=panel.CSS,
    )
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    return Guard(app, uploads=uploads, cache=cache, host=host, allowed=allowed_hosts, megabytes=megabytes)


def temporary_folders() -> tuple[tempfile.TemporaryDirectory, Path]:
    """Return a folder that is removed at exit, and the cache in it; uploads arrive beside the cache."""
    held = tempfile.TemporaryDirectory(prefix="fastvmt-ui-")
    uploads, cache = Path(held.name, "uploads").resolve(), Path(held.name, "cache").resolve()
    uploads.mkdir()
    cache.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    return held, cache
