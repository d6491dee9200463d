"""What a running call tells those who watch it: which stage it is in, how far, and how well it goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

# In the order of a run; guidance and sampling alternate.
STAGES = ("encode text", "encode video", "guidance", "sampling", "decode")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEvent:
    """A stage began, or one of its steps is done.

    stage: one of STAGES. step of steps: done so far; 0 of 0 where a stage begins. losses: of a guided step's
    fresh gradients. latents: the run's own [1, C, F, h, w] after the step, not to be changed. clean: what the
    run would end in if it went straight on from there, for a preview; None where it is not known.
    """

    stage: str
    step: int = 0
    steps: int = 0
    losses: tuple[float, ...] = ()
    latents: Tensor | None = None
    clean: Tensor | None = None


Observer = Callable[[RunEvent], None]


def unobserved(_event: RunEvent) -> None:
    """An observer that does not look."""


@contextmanager
def stage(name: str, observer: Observer, seconds: dict[str, float]) -> Iterator[None]:
    """Tell that a stage begins, and note the seconds that it took."""
    observer(RunEvent(stage=name))
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - started
