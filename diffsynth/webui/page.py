"""Handlers of the page's buttons."""

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from diffsynth.configs.descriptors import NO_TRANSFER
from diffsynth.configs.options import PICTURES
from diffsynth.webui import panel
from diffsynth.webui.gallery import PastRun, asked_for, compared, find_run, past_runs, paths_drawn, poster
from diffsynth.webui.queue import JobCancelledError, JobQueue, QueuedJob
from diffsynth.webui.requests import checked_request
from diffsynth.webui.session import Session, check_budget, expected_minutes, make_video, planned, show_motion
from diffsynth.webui.uploads import keep_picture, keep_upload

logger = logging.getLogger(__name__)

# Reference clips to choose from: those of the clone, which are inside an installed package.
_PACKAGE = Path(__file__).resolve().parent.parent
CLIP_FOLDERS = (_PACKAGE / "embedded" / "data", _PACKAGE.parent / "examples" / "data")
LOOKS_PER_SECOND = 4
_CANCELLED = "Cancelled; nothing was written."
# The options that the page has, in its order, and the model.
_FIELDS = (
    "prompt", "negative_prompt", "preset", "mode", "seed", "denoising_strength", "num_inference_steps",
    "motion_scale", "height", "width", "num_frames", "start", "end", "ref_fps", "fit", "model",
)  # fmt: skip
# These values leave the choice to the model or the preset, as empty fields do.
_UNSET = {"seed": -1} | dict.fromkeys(
    ("num_inference_steps", "height", "width", "num_frames", "start", "end", "ref_fps"), 0
)


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
    """Handlers of the page's buttons, for the sessions of its models, the first one chosen, and one queue.

    `shared`: every visitor sees all past runs, not the own ones alone. Who opens the page with ?owner= and
    the `owner_key` sees all runs and may cancel any.
    """

    def __init__(self, session: Session, queue: JobQueue, *others: Session, shared: bool = True) -> None:
        self.session, self.queue, self.shared = session, queue, shared
        self.sessions = {one.folder.name: one for one in (session, *others)}
        self.owner_key = secrets.token_urlsafe(16)
        self._gradio = import_gradio()
        clips = sorted(path for folder in CLIP_FOLDERS for path in folder.glob("*.mp4"))
        self.clips = [self._shown(path) for path in clips]

    def generate(self, request: Any, uploaded: str | None, *values: Any) -> Iterator[tuple]:
        """Yield progress of a run until it ends: panel, id of the job, videos, files, its name, gallery."""
        *options, picture, beside, model, seen = values
        visitor = request.session_hash

        def start() -> QueuedJob:
            (session, asked), reference = self._request([*options, model]), None
            if uploaded is not None and asked["mode"] != NO_TRANSFER:
                reference = self._kept(uploaded)
            pictures = {} if picture is None else {PICTURES[0]: self._kept(picture, keep_picture)}
            check_budget(session, asked, reference, beside=beside and reference is not None)

            def make(job: QueuedJob) -> list[PastRun]:
                runs = [make_video(session, asked, reference, job, pictures)]
                if beside and reference is not None:
                    plain = {**asked, "mode": NO_TRANSFER, "seed": runs[0].record.options["seed"]}
                    runs.append(make_video(session, plain, None, job, pictures))
                return runs

            return self.queue.submit(make, asked["prompt"], visitor)

        def show(runs: list[PastRun]) -> tuple:
            if seen is not None:
                seen.extend(run.video.name for run in runs)  # the list that the visitor's other runs add to
            return (*self._files_of(*runs), *self.gallery(seen), seen)

        yield from self._follow(start, show, num_shown=8)

    def inspect(self, request: Any, uploaded: str | None, *values: Any) -> Iterator[tuple]:
        """Yield progress of reading a reference's motion: panel, id of the job, video of the motion."""

        def start() -> QueuedJob:
            if uploaded is None:
                raise ValueError("choose or upload a reference video first")
            # The prompt has no influence on a reference's motion, but it must not be empty.
            (session, asked), reference = self._request(("motion", *values[1:])), self._kept(uploaded)
            check_budget(session, asked, reference)
            return self.queue.submit(
                lambda job: show_motion(session, asked, reference, job),
                "its motion",
                request.session_hash,
            )

        def show(path: Path) -> tuple[str, str]:
            return panel.message("Colours and arrows: where it moves, and how far.", "done"), str(path)

        yield from self._follow(start, show, num_shown=1)

    def expected(self, *values: Any) -> str:
        """Return how long a run would take; empty if the values are refused. No reference is read for it."""
        try:
            session, asked = self._request(("a run", *values[1:]))
            minutes = expected_minutes(session, planned(session, asked))
        except (ValueError, TypeError):
            return ""
        if minutes is None:
            return "The first run tells how long others take; fastvmt ui --max-minutes measures it before."
        about = f"{60 * minutes:.0f} s" if minutes < 2 else f"{minutes:.0f} minutes"
        return f"It takes about {about}, less if the reference is short."

    def cancel(self, job_id: str | None) -> str | Any:
        """Ask the visitor's run to stop, and return the panel."""
        if self.queue.cancel(job_id):
            return panel.message("Stopping after this step.")
        return self._gradio.skip()

    def enter(self, request: Any) -> tuple:
        """Return which past runs a visitor may see (None: all), the gallery and what the owner alone has."""
        is_owner = secrets.compare_digest(request.query_params.get("owner", ""), self.owner_key)
        seen: list[str] | None = None if is_owner or self.shared else []
        return seen, *self.gallery(seen), is_owner, self._gradio.update(visible=is_owner)

    def all_runs(self, is_owner: bool) -> Any:
        """Return the choice of runs that wait and run, for the owner."""
        jobs = self.queue.unfinished() if is_owner else []
        return self._gradio.update(
            choices=[(f"{job.state}, {job.seconds:.0f} s: {job.title[:60]}", job.id) for job in jobs]
        )

    def gallery(self, seen: Sequence[str] | None) -> tuple[list[tuple[str, str]], list[str]]:
        """Return posters and prompts of past runs, of all of them if `seen` is None, and their names."""
        shown, names = [], []
        for run in past_runs(self.session.output_dir):
            if seen is None or run.video.name in seen:
                try:
                    shown.append((str(poster(run, self.session.cache)), run.record.prompt))
                    names.append(run.video.name)
                except (OSError, ValueError) as error:
                    logger.warning("%s is left out of the gallery: %s", run.video, error)
        return shown, names

    def open_past(self, names: Sequence[str], seen: Sequence[str] | None, event: Any) -> tuple:
        """Return panel, videos, files and name of the past run that was chosen, if the visitor may see it."""
        try:
            return self._files_of(self._past(names[event.index], seen))
        except (ValueError, OSError) as error:
            return (self._bare(panel.failed(error)), *[self._gradio.skip()] * 5)

    def settings(self, name: str | None, seen: Sequence[str] | None) -> tuple:
        """Return panel, reference, fields and picture that ask for the run of that name once more."""
        try:
            if name is None:
                raise ValueError("choose one of the past runs first")
            run = self._past(name, seen)
            of_run = (s for s in self.sessions.values() if s.model["folder"] == run.record.model["folder"])
            session = next(of_run, self.session)
            values, sources = asked_for(run, session.defaults)
            reference, picture = (path and self._shown(path) for path in sources)
            text = panel.message("The fields have the settings of that run.", "done")
            values["model"] = session.folder.name
            return (text, reference, *(values.get(field) for field in _FIELDS), picture)
        except (ValueError, OSError) as error:
            return (self._bare(panel.failed(error)), *[self._gradio.skip()] * (len(_FIELDS) + 2))

    def session_of(self, model: str | None) -> Session:
        """Return the session of a model by its name, by default the first; ValueError for another name."""
        if model is not None and model not in self.sessions:
            raise ValueError(f"model must be one of {', '.join(self.sessions)}; got {model!r:.80}")
        return self.session if model is None else self.sessions[model]

    def _past(self, name: str, seen: Sequence[str] | None) -> PastRun:
        if seen is not None and name not in seen:
            raise ValueError("that run is not yours")
        return find_run(self.session.output_dir, name)

    def _request(self, values: Sequence[Any]) -> tuple[Session, dict[str, Any]]:
        asked = dict(zip(_FIELDS, values, strict=True))
        session = self.session_of(asked.pop("model"))
        given = {name: v for name, v in asked.items() if v is not None and v != _UNSET.get(name)}
        return session, checked_request(given)

    def _kept(self, uploaded: str, keep: Callable[..., Path] = keep_upload) -> Path:
        arrived = Path(os.environ["GRADIO_TEMP_DIR"])
        return keep(uploaded, arrived, self.session.references, self.session.limits)

    def _follow(
        self, start: Callable[[], QueuedJob], show: Callable[[Any], tuple], num_shown: int
    ) -> Iterator[tuple]:
        """Queue a job, and yield (panel, job id, *shown outputs) several times a second until it ends.

        Panel and id are those of the visitor's first unfinished job, whichever of them is followed.
        """
        unchanged = [self._gradio.skip()] * num_shown
        try:
            job = start()
            while not job.future.done():
                job.followed()
                own = [one for one in self.queue.unfinished() if one.visitor == job.visitor] or [job]
                first, ahead = own[0], self.queue.ahead(own[0])
                text = panel.running(first.progress, first.state, ahead, first.seconds, len(own) - 1)
                yield (text, first.id, *unchanged)
                time.sleep(1 / LOOKS_PER_SECOND)
                while not job.warnings.empty():
                    self._gradio.Warning(self._bare(job.warnings.get().getMessage()))
            error = job.error()
            status, *shown = (None, *unchanged) if error else show(job.result())
        except (ValueError, TypeError, RuntimeError, OSError) as problem:
            error, shown = problem, unchanged
        if cancelled := isinstance(error, JobCancelledError | CancelledError):
            status = panel.message(_CANCELLED)
            self._gradio.Warning(_CANCELLED, title="Cancelled")
        elif error is not None:
            status = self._bare(panel.failed(error))
        yield (status, None, *shown)
        if error is not None:  # so that a program that calls this page sees no success
            text = self._bare(str(error)) or type(error).__name__
            raise self._gradio.Error(text, visible=not cancelled, print_exception=False)

    def _bare(self, text: str) -> str:
        """Return a text for visitors, in which files of the server have their names alone."""
        models = (one.folder.parent for one in self.sessions.values())
        folders = map(re.escape, map(str, (self.session.output_dir, self.session.cache.parent, *models)))
        return re.sub(rf"({'|'.join(folders)})[/\\]([\w.-]+[/\\])*", "", text)

    def _files_of(self, run: PastRun, without: PastRun | None = None) -> tuple:
        video, both = self._shown(run.video), str(compared(run, self.session.cache, without))
        paths = paths_drawn(run, self.session.cache)
        files = [video, self._shown(run.record_file)]
        return panel.finished(run), both, video, paths and str(paths), files, run.video.name

    def _shown(self, path: Path) -> str:
        """Return the path of a copy in the cache, the only folder that the server serves."""
        return self._gradio.processing_utils.save_file_to_cache(path, str(self.session.cache))
