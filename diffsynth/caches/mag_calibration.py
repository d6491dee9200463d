"""Measure the ratios that MagCache decides by, for any checkpoint, number of steps and kind of run.

The ratio of a step is the mean over tokens of |residual| / |residual of the step before|, as published.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffsynth.caches.rules import Probe
from diffsynth.configs.cache_tables import PROMPTS, MagRatios

logger = logging.getLogger(__name__)

DIGITS = 5  # as in the published tables


class _Series:
    """A rule that never skips and keeps the ratios of one prompt's run, on the device until they are read."""

    probe_blocks = 0

    def __init__(self) -> None:
        self._previous: Tensor | None = None
        self._ratios: list[Tensor] = []

    def decide(self, probe: Probe) -> bool:  # noqa: ARG002
        return True

    def store(self, residual: Tensor) -> None:
        norms = residual.norm(dim=-1)
        self._ratios.append(torch.ones(()) if self._previous is None else (norms / self._previous).mean())
        self._previous = norms

    @property
    def residual(self) -> Tensor:
        raise AssertionError("no step is skipped while ratios are measured")

    def state(self) -> dict[str, object]:
        numbered = {f"ratio.{step}": ratio for step, ratio in enumerate(self._ratios)}
        return {**numbered, "steps": len(self._ratios), "previous": self._previous}

    def restore(self, state: Mapping[str, object]) -> None:
        self._ratios = [state[f"ratio.{step}"] for step in range(state["steps"])]
        self._previous = state["previous"]

    def ratios(self) -> list[float]:
        return [ratio.item() for ratio in self._ratios]


class _Recorder:
    """Makes a series for each prompt of each run."""

    def __init__(self) -> None:
        self.series: dict[str, list[_Series]] = {name: [] for name in PROMPTS}
        self._expected: dict[str, int] = {}

    def make(self, prompt: str, steps: range, num_steps: int) -> _Series:
        if len(steps) != num_steps:
            raise ValueError("calibrate_magcache needs both prompts at every step; leave cfg_interval away")
        self.series[prompt].append(_Series())
        return self.series[prompt][-1]

    def mean(self, prompt: str) -> tuple[float, ...] | None:
        """The mean over runs of each step's ratio; None if the prompt was not run."""
        runs = [series.ratios() for series in self.series[prompt]]
        if not runs:
            return None
        return tuple(round(sum(step) / len(step), DIGITS) for step in zip(*runs, strict=True))


def calibrate_magcache(
    pipe: Callable[..., object], prompts: Sequence[str], negative_prompt: str = "", **call: object
) -> MagRatios:
    """Run the pipeline once for each prompt, all blocks at every step, and measure the residuals' ratios.

    call: any other arguments of the pipeline's call, num_inference_steps, seed and input_video among them:
    the ratios are those of runs like this. One prompt does, as published; the mean over several is steadier.
    Raises ValueError without prompts, for runs that were ended early, and what the pipeline's call raises.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt; got {prompts!r}")
    recorder = _Recorder()
    pipe(list(prompts), negative_prompt, **call, cache=recorder, output_type="latent")
    for name, runs in recorder.series.items():
        counts = {len(series.ratios()) for series in runs}
        if len(counts) > 1 or len(runs) not in (0, len(prompts)):
            raise ValueError(f"the runs were ended early: {name} prompts took {sorted(counts)} steps")
    ratios = MagRatios(recorder.mean("positive"), recorder.mean("negative"))
    logger.info("MagCache ratios over %d run(s): %s", len(prompts), ratios)
    return ratios
