"""Measure the ratios that MagCache decides by, for any checkpoint, number of steps and kind of run.

The ratio of a step is the mean over tokens of |residual| / |residual of the step before|, as published.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffsynth.caches.rules import Probe, StepCache
from diffsynth.configs.cache_tables import PROMPTS, MagRatios

logger = logging.getLogger(__name__)

DIGITS = 5  # as in the published tables


class _Series(StepCache):
    """A rule that never skips and keeps the ratios of one prompt's run, on the device until they are read."""

    kept = ("ratios", "_previous")

    def __init__(self) -> None:
        super().__init__()
        self.ratios = torch.empty(0)
        self._previous: Tensor | None = None

    def decide(self, _probe: Probe) -> bool:
        return True

    def store(self, residual: Tensor) -> None:
        norms = residual.norm(dim=-1)
        ratio = norms.new_ones(1) if self._previous is None else (norms / self._previous).mean()[None]
        self.ratios = torch.cat([self.ratios.to(norms), ratio])
        self._previous = norms


class _Recorder:
    """Makes a series for each prompt of each run."""

    def __init__(self) -> None:
        self.series: dict[str, list[_Series]] = {name: [] for name in PROMPTS}

    def make(self, prompt: str, steps: range, num_steps: int) -> _Series:
        if len(steps) != num_steps:
            raise ValueError("calibrate_magcache needs both prompts at every step; leave cfg_interval away")
        self.series[prompt].append(_Series())
        return self.series[prompt][-1]


def calibrate_magcache(
    pipe: Callable[..., object], prompts: Sequence[str], negative_prompt: str = "", **call: object
) -> MagRatios:
    """Run the pipeline once for each prompt, all blocks at every step, and measure the residuals' ratios.

    One prompt is enough, as published; the mean over several is steadier.

    Args:
        pipe: the pipeline.
        prompts, negative_prompt: texts as for the call.
        call: other arguments of the pipeline's call, num_inference_steps, seed and input_video among them;
            the ratios are those of runs like this.

    Raises:
        ValueError: there is no prompt, or a run was ended early.
        What the pipeline's call raises.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt; got {prompts!r}")
    recorder = _Recorder()
    pipe(list(prompts), negative_prompt, **call, cache=recorder, output_type="latent")
    means = {}
    for name, runs in recorder.series.items():
        counts = {len(series.ratios) for series in runs}
        if len(counts) > 1 or len(runs) not in (0, len(prompts)):
            raise ValueError(f"the runs were ended early: {name} prompts took {sorted(counts)} steps")
        if runs:
            steps = torch.stack([series.ratios.double() for series in runs]).mean(dim=0)
            means[name] = tuple(round(ratio, DIGITS) for ratio in steps.tolist())
    ratios = MagRatios(**means)
    logger.info("MagCache ratios over %d run(s): %s", len(prompts), ratios)
    return ratios
