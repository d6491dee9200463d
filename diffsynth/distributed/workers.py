"""Jobs over several workers, each of which loads the model once: processes of this machine, or actors of Ray.

A job whose worker dies is given to a new one, which continues after the last step that was saved. That no two
make one video is the lock's in the folder of its run, that none makes it again is the job hash in its record.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

Do = Callable[[Any], Any]
ATTEMPTS = 20  # deaths of workers after which a job is given up
_here: list[Any] = []  # the one object of a worker's process


class WorkerDiedError(RuntimeError):
    """Raised when a worker ends in the middle of a job, as when memory runs out or its machine goes."""


def over_workers(jobs: Sequence[Any], start: Callable[[], Do], num_workers: int) -> Iterator[Any]:
    """Yield the results of jobs as they come; `start` starts a worker and returns what does a job on it."""
    mine = threading.local()

    def serve(job: Any, attempts: int = ATTEMPTS) -> Any:
        try:
            if getattr(mine, "do", None) is None:
                mine.do = start()
            return mine.do(job)
        except WorkerDiedError:
            mine.do = None
            if attempts == 1:
                raise
        return serve(job, attempts - 1)

    with ThreadPoolExecutor(num_workers) as pool:
        try:
            yield from (done.result() for done in as_completed([pool.submit(serve, job) for job in jobs]))
        finally:
            pool.shutdown(cancel_futures=True)


def start_process(make: Callable[..., Any], *arguments: Any) -> Do:
    """Start a process with an object make(*arguments), whose method `make` does the jobs."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (make, *arguments))
    return _watched(lambda job: pool.submit(_make, job).result(), BrokenProcessPool)


def start_actor(make: Callable[..., Any], *arguments: Any) -> Do:
    """Start an actor of Ray on a GPU, or on a CPU where there are none; otherwise as `start_process`."""
    import ray

    on_gpu = ray.cluster_resources().get("GPU", 0) > 0
    actor = ray.remote(num_gpus=int(on_gpu), num_cpus=1)(make).remote(*arguments)
    return _watched(lambda job: ray.get(actor.make.remote(job)), ray.exceptions.RayActorError)


def _watched(do: Do, death: type[Exception]) -> Do:
    """Return what does a job, or raises WorkerDiedError where `do` raises a worker's death."""

    def watched(job: Any) -> Any:
        try:
            return do(job)
        except death as error:
            raise WorkerDiedError(str(error)) from error

    return watched


def _begin(make: Callable[..., Any], *arguments: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _here.append(make(*arguments))


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _make(job: Any) -> Any:
    return _here[0].make(job)
