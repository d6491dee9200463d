"""`fastvmt batch`: make many videos with one load of the model; started again, it continues.

A job is done when a video with a record of the same job is in the output folder. The record is inside the
video, and the video appears whole, so a kill at any moment leaves a job either done or not begun.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffsynth.cli.arguments import pictures_of
from diffsynth.cli.console import DONE, FAILED, Console
from diffsynth.cli.job_files import JobLine, read_jobs
from diffsynth.cli.progress import run_watched, saving_arguments
from diffsynth.data.files import FileInUseError, locked
from diffsynth.jobs.errors import RunFailedError, UsageError, disk_is_at_fault
from diffsynth.jobs.models import choose_model, load_options, load_pipeline
from diffsynth.jobs.publish import check_folder, check_output, check_space
from diffsynth.jobs.task import (
    VideoTask,
    forget_run,
    make_task,
    request_hash,
    summary,
    task_options,
    was_made,
)
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.runs.record import describe_model

logger = logging.getLogger(__name__)

LOCK = ".fastvmt-batch.lock"
_ERRORS = (ValueError, TypeError, RuntimeError, OSError, MemoryError)


def run(options: Namespace, console: Console) -> int:
    """Do the jobs that are not done; one that fails does not stop the others.

    A full or broken disk ends the batch: it would compute and lose every job. The code is 1 if one failed.

    Raises:
        UsageError: the jobs file or an option is wrong.
        RunFailedError: the model cannot be loaded, or another batch writes to the folder.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    folder: Path = options.output_dir
    if options.checkpoint_dir is not None:
        raise UsageError("--checkpoint-dir is for one video; --resume has a folder for each")
    spread = options.workers is not None or options.ray is not None
    if spread and getattr(options, "resume", None) is None:
        options.resume = True  # a job continues when its worker dies
    jobs = read_jobs(options.jobs, folder, task_options(vars(options)), pictures_of(options))
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_batch(folder):
        batch = _Batch(options, console)
        # All of them first, so that a wrong line is known before hours of work.
        results = [task for job in jobs if isinstance(task := batch.prepare(job), dict)]
        left = [job for job in jobs if job.line in batch.tasks]
        made = _spread(left, options) if spread else map(batch.make, left)
        for number, job in enumerate(left, 1):
            console.note(f"{number} of {len(left)} jobs{'' if spread else f' (line {job.line})'}")
            try:
                results.append(next(made))
            except KeyboardInterrupt as stop:
                where = "several jobs" if spread else f"the job of line {job.line}"
                raise KeyboardInterrupt(f"interrupted in {where}; the same command continues it") from stop
            if results[-1].pop("disk", False):
                later = len(jobs) - len(results)
                console.problem(f"the disk takes nothing more: {later} jobs are left for the next start")
                break
        results.sort(key=lambda result: result["line"])
    counts = {state: sum(r["state"] == state for r in results) for state in ("done", "skipped", "failed")}
    console.say(f"{counts['done']} done, {counts['skipped']} were done before, {counts['failed']} failed")
    for result in results:
        if result["state"] == "failed":
            console.say(f"  line {result['line']}: {result['error']}")
    console.result({"jobs": results, **counts})
    return FAILED if counts["failed"] else DONE


def _spread(jobs: Sequence[JobLine], options: Namespace) -> Iterator[dict[str, Any]]:
    """Yield the results of jobs that workers do, in any order."""
    from diffsynth.distributed.workers import over_workers, start_actor, start_process

    start, workers = start_process, options.workers or 1
    if options.ray is not None:
        import ray

        ray.init(address=options.ray if options.ray != "local" else None, log_to_driver=False)
        resources = ray.cluster_resources()
        start, workers = start_actor, options.workers or int(resources.get("GPU", 0) or resources["CPU"])
    silent = Console(json=True, quiet=True)
    yield from over_workers(jobs, partial(start, _Batch, options, silent), min(workers, len(jobs) or 1))


class _Batch:
    """The model that the jobs share, loaded when the first job needs it."""

    def __init__(self, options: Namespace, console: Console) -> None:
        self._options, self._console = options, console
        self._loaded = load_options(vars(options))
        self._told: list[str] = []
        self._checkpoint = choose_model(options.model, options.models_dir, self._told.append, self._loaded)
        self._model = describe_model(self._checkpoint, asdict(self._loaded))
        self._pipe: WanVideoPipeline | None = None
        self.tasks: dict[int, VideoTask] = {}  # by line

    def prepare(self, job: JobLine) -> VideoTask | dict[str, Any]:
        """Return the task of a job, or the facts for the summary if it cannot be one."""
        try:
            task = make_task(job.options, job.reference, self._checkpoint, job.pictures)
            identity = request_hash(job.options, task, self._model)
            # A name that is the same for the same job, wherever it stands in the file.
            name = f"{'text' if job.reference is None else job.reference.stem}-{identity[:10]}.mp4"
            output = job.output or self._options.output_dir / name
            saving = saving_arguments(self._options, output)
            overwrite = self._options.overwrite
            task = replace(task, output=output, overwrite=overwrite, saving=saving, job=identity)
            if not was_made(task, self._model):
                check_output(output, overwrite)
        except _ERRORS as error:
            return self._failure(job, error)
        self.tasks[job.line] = task
        return task

    def make(self, job: JobLine) -> dict[str, Any]:
        """Do one job, unless it is done, and return its facts; RunFailedError if no model can be loaded."""
        task = self.tasks.get(job.line) or self.prepare(job)
        if isinstance(task, dict):
            return task
        assert task.output is not None
        try:
            if was_made(task, self._model):
                forget_run(task)
                self._console.note(f"{task.output} was done before")
                return {"line": job.line, "state": "skipped"}
            check_output(task.output, task.overwrite)
            check_space(task.output, task.num_bytes, task.file.lossless)
            task.output.parent.mkdir(parents=True, exist_ok=True)
        except _ERRORS as error:
            return self._failure(job, error)
        if self._pipe is None:
            self._console.note("\n".join([*self._told, "load the model"]))
            self._pipe = load_pipeline(self._checkpoint, self._loaded)
        try:
            path, record, *_ = run_watched(self._pipe, task, self._model, self._loaded, self._console)
        except _ERRORS as error:
            return self._failure(job, error)
        self._console.say(summary(path, record))
        return {"line": job.line, "state": "done", "output": str(path)}

    def _failure(self, job: JobLine, error: Exception) -> dict[str, Any]:
        logger.info("the job of line %d failed", job.line, exc_info=error)
        text = str(error) or type(error).__name__
        self._console.problem(f"line {job.line} failed: {text}")
        return {"line": job.line, "state": "failed", "error": text, "disk": disk_is_at_fault(error)}


@contextmanager
def _only_batch(folder: Path) -> Iterator[None]:
    """Return a context in which no other batch writes to a folder. Raises RunFailedError if one does."""
    try:
        with locked(folder / LOCK, f"another batch is writing to {folder}; wait for its end"):
            yield
    except FileInUseError as error:
        raise RunFailedError(str(error)) from error
