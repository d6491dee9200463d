"""SIGINT and SIGTERM while a run is being saved: an exception that says that the run can be continued."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class RunInterrupted(KeyboardInterrupt):
    """Raised when a signal stops a run; its finished steps are in a folder, and the same call continues it.

    This is a KeyboardInterrupt, so that code that catches every Exception does not catch it.

    Attributes:
        signal: number of the signal.
        folder: the checkpoint_dir of the run.
    """

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; finished steps are in {folder}: "
            "the same call with this checkpoint_dir continues from there"
        )
        self.signal, self.folder = number, folder


@contextmanager
def stoppable(folder: Path, stop_run: Callable[[], None]) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM in this context raise RunInterrupted; further ones are ignored.

    It is raised at once and not at the end of a step, which may take a minute: a machine that is taken away
    leaves seconds. `stop_run` is called first: the run also stops where its caller swallows exceptions.
    """
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if received:
            return
        received.append(number)
        stop_run()
        raise RunInterrupted(number, folder)

    with handling((signal.SIGINT, signal.SIGTERM), stop):
        yield
    if received:
        raise RunInterrupted(received[0], folder)


@contextmanager
def handling(signals: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let a function handle signals in this context; a signal that the process ignores stays ignored.

    Python allows this in the main thread only; in other threads nothing changes.
    """
    before = {number: signal.getsignal(number) for number in signals}
    in_main = threading.current_thread() is threading.main_thread()
    # None stands for a handler that Python did not set and could not put back.
    ours = [number for number, old in before.items() if in_main and old not in (None, signal.SIG_IGN)]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
