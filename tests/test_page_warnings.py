"""What a run warns of is kept for the visitor whose run it is."""

import logging
import threading

from diffsynth.webui.queue import JobQueue

logger = logging.getLogger("diffsynth.planning.reference")


def test_a_job_keeps_the_warnings_of_its_own_thread_alone():
    queue, running, done = JobQueue(), threading.Event(), threading.Event()

    def work(_job):
        logger.info("a detail")
        logger.warning("the reference has a cut at frame %d", 4)
        running.set()
        done.wait(10)

    job = queue.submit(work)
    assert running.wait(10)
    logger.warning("of another visitor")
    done.set()
    job.result(10)
    logger.warning("afterwards")
    queue.close()
    told = [job.warnings.get().getMessage() for _ in range(job.warnings.qsize())]
    assert told == ["the reference has a cut at frame 4"]
