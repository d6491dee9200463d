"""Step caches: rules that decide which denoising steps reuse the last residual of the DiT's blocks.

At each step, a rule decides for one prompt whether the blocks run. If not, the last residual (what they added
to their input when they last ran) is added instead. Each prompt has its own rule object, so that
decisions do not depend on whether both prompts share a DiT call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsynth.configs.caches import CACHES, CacheOptions
from diffsynth.configs.fields import load
from diffsynth.configs.kinds import CacheMaker
from diffsynth.models.wan_video_dit import DiTState, WanModel


class Probe(NamedTuple):
    """Inputs of a rule, for one prompt: the time projection [1, 6, D], and what the first `probe_blocks`
    blocks, which always run, added to the tokens [1, S, D] (None if `probe_blocks` is 0).
    """

    modulation: Tensor
    residual: Tensor | None


class StepCache:
    """Base class of rules; keeps the residual in float32 (201 MB for 81 frames of 480x832, width 1536).

    Attributes:
        probe_blocks: number of leading blocks that run at every step, before the decision.
        kept: names of the attributes that `state` must include because later decisions read them. Their
            values are plain numbers, or tensors that are never changed in place.
    """

    probe_blocks = 0
    kept: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._residual: Tensor | None = None

    def decide(self, probe: Probe) -> bool:
        """Return True if the blocks must run at this step. Called once a step, in order."""
        raise NotImplementedError

    def store(self, residual: Tensor) -> None:
        """Keep what the blocks after `probe_blocks` added to their input [1, S, D]."""
        self._residual = residual

    @property
    def residual(self) -> Tensor:
        """Return the last stored residual; RuntimeError if there is none."""
        if self._residual is None:
            raise RuntimeError("No residual is stored: call store after each step whose blocks must run")
        return self._residual

    def state(self) -> dict[str, object]:
        """Return the state that later steps need: tensors and plain numbers by name."""
        return {name: getattr(self, name) for name in ("_residual", *self.kept)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Restore a `state`, so that later decisions and residuals are those of the uninterrupted run."""
        for name, value in state.items():
            setattr(self, name, value)


def make_rule(cache: CacheOptions | CacheMaker, prompt: str, steps: range, num_steps: int) -> StepCache:
    """Return a new rule for one prompt.

    Raises:
        TypeError: the object's rules lack state() or restore(), so that a run could not be resumed.
    """
    if isinstance(cache, CacheOptions):
        return load(CACHES[cache.name].rule).from_options(cache, prompt, steps, num_steps)
    rule = cache.make(prompt, steps, num_steps)
    if not hasattr(rule, "state") or not hasattr(rule, "restore"):
        raise TypeError(f"cache.make must return rules with state(), restore(); got {type(rule).__name__}")
    return rule


def run_blocks_cached(dit: WanModel, state: DiTState, caches: Sequence[StepCache]) -> Tensor:
    """Return tokens [B, S, D] after all blocks, which run only for the samples whose cache requires it.

    If all caches require it, the result is bit-identical to `dit.run_blocks(state)`.
    """
    first = caches[0].probe_blocks
    before = dit.run_blocks(state, stop=first) if first else state.tokens
    added = (before - state.tokens).split(1) if first else [None] * len(caches)
    # If a sample has several timesteps, use the last frame's: the first frame's is 0 if an image fixes it.
    modulation = state.modulation if state.modulation.ndim == 3 else state.modulation[:, -1]
    probes = map(Probe, modulation.split(1), added)
    computing = [cache.decide(probe) for cache, probe in zip(caches, probes, strict=True)]
    chosen = [i for i, computes in enumerate(computing) if computes]
    ran = before[:0]
    if chosen:
        rest = replace(state, tokens=before)
        ran = dit.run_blocks(rest if all(computing) else _samples(rest, chosen), start=first)
        for row, i in enumerate(chosen):
            caches[i].store(ran[row : row + 1] - before[i : i + 1])
    if all(computing):
        return ran
    done = iter(ran.split(1))
    return torch.cat(
        [
            next(done) if computes else sample + cache.residual
            for sample, cache, computes in zip(before.split(1), caches, computing, strict=True)
        ]
    )


def _samples(state: DiTState, chosen: Sequence[int]) -> DiTState:
    """Return the state of the chosen samples, from slices: indexing with a list synchronises the device."""
    names = ("tokens", "time", "modulation", "context", "image_context")
    tensors = {name: tensor for name in names if (tensor := getattr(state, name)) is not None}
    rows: dict[str, Any] = {n: torch.cat([t[i : i + 1] for i in chosen]) for n, t in tensors.items()}
    return replace(state, **rows)
