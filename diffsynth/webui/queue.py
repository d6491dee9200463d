"""The page's queue: jobs run one after the other, so that two runs never share the memory.

The work of a job is a function of its `QueuedJob`, to which it reports progress and by which it is cancelled.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
MOST_WAITING = 32
MOST_ABSENT = 60.0  # seconds after which a job that no client follows is cancelled


class QueueFullError(RuntimeError):
    """Raised when the queue already holds its maximum number of jobs."""


class JobCancelledError(RuntimeError):
    """Raised in a job that was cancelled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunProgress:
    """Progress of a run; `losses` has the last loss of each guided step, divided by its first."""

    stage: str = "start"  # of `RunEvent`
    step: int = 0  # denoising steps done, of `steps`
    steps: int = 0  # of the whole run
    guided: int = 0  # guided steps done, of `guided_steps`
    guided_steps: int = 0  # of the whole run
    losses: tuple[float, ...] = ()  # one number a guided step
    preview: bytes | None = None  # an image of the clean sample predicted so far


class QueuedJob:
    """A piece of work in a queue.

    Attributes:
        title: says what the work is.
        visitor: says whose it is.
        id: random text that cannot be guessed, so that no visitor cancels the job of another.
        progress: progress of the run.
        warnings: log records of the run that its visitor is told.
        future: future of the result.
        stop: set once the job is cancelled; it also stops the run of the pipeline.
    """

    def __init__(self, title: str = "", visitor: str = "") -> None:
        self.title, self.visitor = title, visitor
        self.id = secrets.token_urlsafe(16)
        self.progress = RunProgress()
        self.warnings: SimpleQueue[logging.LogRecord] = SimpleQueue()
        self.future: Future = Future()
        self._started: float | None = None
        self._ended: float | None = None
        self.stop = threading.Event()
        self._followed = time.monotonic()

    @property
    def state(self) -> str:
        """WAITING, RUNNING, DONE, FAILED or CANCELLED."""
        if not self.future.done():
            return WAITING if self._started is None else RUNNING
        error = self.error()
        if error is None:
            return DONE
        return CANCELLED if isinstance(error, JobCancelledError | CancelledError) else FAILED

    @property
    def seconds(self) -> float:
        """Duration of the work so far in seconds, without the time in the queue."""
        if self._started is None:
            return 0.0
        return (self._ended or time.monotonic()) - self._started

    def error(self) -> BaseException | None:
        """Return the error that ended the job; None before its end and after success."""
        if not self.future.done():
            return None
        return CancelledError() if self.future.cancelled() else self.future.exception()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the work at most `timeout` seconds, and return its result or raise its error."""
        return self.future.result(timeout)

    def report(self, **changes: Any) -> None:
        """Set fields of `RunProgress`."""
        self.progress = replace(self.progress, **changes)

    def followed(self) -> None:
        """Note that somebody follows the job."""
        self._followed = time.monotonic()

    def check(self) -> None:
        """Raise JobCancelledError if the job was cancelled, or nobody follows it any more."""
        if self.stop.is_set():
            raise JobCancelledError("cancelled; no video was written")
        if time.monotonic() - self._followed > MOST_ABSENT:
            raise JobCancelledError(f"cancelled: page closed for {MOST_ABSENT:g} s; no video was written")

    def cancel(self) -> None:
        """Cancel the job: at once if it waits, else at the next `check` of its work."""
        self.stop.set()
        self.future.cancel()

    def run(self, work: Callable[["QueuedJob"], Any]) -> Any:
        """Do the work; the queue calls this."""
        self._started = time.monotonic()
        handler, own = QueueHandler(self.warnings), threading.get_ident()
        handler.addFilter(lambda record: record.levelno >= logging.WARNING and record.thread == own)
        logging.getLogger("diffsynth").addHandler(handler)
        try:
            self.check()
            return work(self)
        finally:
            logging.getLogger("diffsynth").removeHandler(handler)
            self._ended = time.monotonic()


class JobQueue:
    """A queue that runs jobs one after the other in one thread, in the order in which they were submitted."""

    def __init__(self, most_waiting: int = MOST_WAITING) -> None:
        self._most_waiting = most_waiting
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fastvmt-ui")
        self._unfinished: dict[str, QueuedJob] = {}
        self._lock = threading.Lock()

    def submit(self, work: Callable[[QueuedJob], Any], title: str = "", visitor: str = "") -> QueuedJob:
        """Queue the work; QueueFullError if too many jobs wait already."""
        job = QueuedJob(title, visitor)
        with self._lock:
            waiting = max(0, len(self._unfinished) - 1)
            if waiting >= self._most_waiting:
                raise QueueFullError(f"{waiting} runs are waiting already; try again when some are done")
            self._unfinished[job.id] = job
            job.future = self._worker.submit(job.run, work)
        job.future.add_done_callback(lambda _future: self._unfinished.pop(job.id, None))
        return job

    def cancel(self, job_id: str | None) -> bool:
        """Cancel the unfinished job with this id, and return whether there was one."""
        job = self._unfinished.get(job_id or "")
        if job is not None:
            job.cancel()
        return job is not None

    def unfinished(self) -> list[QueuedJob]:
        """Return the jobs that wait or run, in their order."""
        with self._lock:
            return list(self._unfinished.values())

    def ahead(self, job: QueuedJob) -> int:
        """Return how many unfinished jobs come before this one."""
        jobs = self.unfinished()
        return jobs.index(job) if job in jobs else 0

    def close(self) -> None:
        """Cancel all jobs, and wait until the worker has stopped."""
        for job in self.unfinished():
            job.cancel()
        self._worker.shutdown(cancel_futures=True)
