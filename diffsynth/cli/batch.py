"""`fastvmt batch`: load the model once and make many videos; running it again continues an unfinished batch.

A job counts as done when its output is a complete video whose embedded record is from the same job. A
video is moved to its path only when it is complete, so a batch killed at any moment leaves no partial video.
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
    """Run all jobs that are not done yet, even if some fail; return the exit code, 1 if any failed.

    Only a full or broken disk ends the batch, since no later job could save its video.

    Raises:
        UsageError: the jobs file or an option is wrong.
        RunFailedError: the model cannot be loaded, or another batch writes to the folder.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    folder: Path = options.output_dir
    if options.checkpoint_dir is not None:
        raise UsageError("--checkpoint-dir is for one video; use --resume, which gives each video a folder")
    spread = options.workers is not None or options.ray is not None
    if spread and getattr(options, "resume", None) is None:
        options.resume = True  # a job continues on a new worker if its worker dies
    jobs = read_jobs(options.jobs, folder, task_options(vars(options)), pictures_of(options))
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _only_batch(folder):
        batch = _Batch(options, console)
        # Prepare all jobs first, so that an invalid line is reported before hours of work.
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
    """Run jobs on several workers and yield their results as they are completed, in any order."""
    from diffsynth.distributed.workers import over_workers, start_actor, start_process

    start, workers = start_process, options.workers or 1
    if options.ray is not None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("--ray needs Ray: pip install 'fastvmt[ray]'") from error
        ray.init(address=options.ray if options.ray != "local" else None, log_to_driver=False)
        found = ray.cluster_resources()  # without CPUs while a cluster's workers are only coming
        start, workers = start_actor, options.workers or int(found.get("GPU", 0) or found.get("CPU", 1))
    silent = Console(json=True, quiet=True)
    yield from over_workers(jobs, partial(start, _Batch, options, silent), min(workers, len(jobs) or 1))


class _Batch:
    """Runs jobs one after another with a shared model, which is loaded when the first job needs it."""

    def __init__(self, options: Namespace, console: Console) -> None:
        self._options, self._console = options, console
        self._loaded = load_options(vars(options))
        self._told: list[str] = []
        self._checkpoint = choose_model(options.model, options.models_dir, self._told.append, self._loaded)
        self._model = describe_model(self._checkpoint, asdict(self._loaded))
        self._pipe: WanVideoPipeline | None = None
        self.tasks: dict[int, VideoTask] = {}  # by line

    def prepare(self, job: JobLine) -> VideoTask | dict[str, Any]:
        """Return the task of a job, or its entry in the summary if the job is invalid."""
        try:
            task = make_task(job.options, job.reference, self._checkpoint, job.pictures)
            identity = request_hash(job.options, task, self._model)
            # The name depends on the job alone, not on its line in the jobs file.
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
        """Run a job unless it is done; return its summary entry. RunFailedError: the model does not load."""
        task = self.tasks.get(job.line) or self.prepare(job)
        if isinstance(task, dict):
            return task
        assert task.output is not None
        try:
            if was_made(task, self._model):
                forget_run(task)
                self._console.note(f"{task.output} was done before")
                return {"line": job.line, "state": "skipped"}
            check_output(task.output, task.overwrite, [task.reference["path"]] if task.reference else [])
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
    """Lock a folder in this context; RunFailedError if another batch is writing to it."""
    try:
        with locked(folder / LOCK, f"another batch is writing to {folder}; wait for its end"):
            yield
    except FileInUseError as error:
        raise RunFailedError(str(error)) from error
