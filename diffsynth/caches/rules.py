"""Denoising steps that reuse the last one's work: one seam for all rules that decide when.

A rule looks at a step of one prompt and says whether the blocks run. If they do not, the last residual, what
the blocks added to their input when they last ran, stands for them. Each prompt has its own rule object, so
that both prompts in one DiT call and each in its own decide alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffsynth.models.wan_video_dit import DiTState, WanModel


class Probe(NamedTuple):
    """What a rule may look at, of one prompt: the time projection [1, 6, D], and what the blocks that always
    run added to the tokens [1, S, D] (None where no block always runs).
    """

    modulation: Tensor
    residual: Tensor | None


class StepCache(Protocol):
    """A rule, with what it keeps of one prompt's steps.

    probe_blocks: blocks, from the first, that run at every step before the decision.
    """

    probe_blocks: int

    def decide(self, probe: Probe) -> bool:
        """True if the blocks must run at this step. Called once a step, in order."""

    def store(self, residual: Tensor) -> None:
        """Keep what the blocks after `probe_blocks` added to their input [1, S, D]."""

    @property
    def residual(self) -> Tensor:
        """The last stored residual."""

    def state(self) -> dict[str, object]:
        """What later decisions need of the steps so far: tensors and plain numbers by name, none of which
        later steps change in place.
        """

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a `state`: decisions and residuals are the same."""


class KeptResidual:
    """The residual that a rule keeps: float32 [1, S, D], 201 MB for 81 frames of 480x832 at width 1536."""

    def __init__(self) -> None:
        self._residual: Tensor | None = None

    def store(self, residual: Tensor) -> None:
        """Keep the blocks' output minus their input, of any shape, for the steps that skip them."""
        self._residual = residual

    @property
    def residual(self) -> Tensor:
        """The last stored residual. Raises RuntimeError if there is none."""
        if self._residual is None:
            raise RuntimeError("No residual is stored: call store after each step whose blocks must run")
        return self._residual

    def state(self) -> dict[str, object]:
        """What is kept, as tensors and plain numbers by name."""
        return {"residual": self._residual}

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a `state`."""
        self._residual = state["residual"]


def run_blocks_cached(dit: WanModel, state: DiTState, caches: Sequence[StepCache]) -> Tensor:
    """Tokens [B, S, D] after all blocks; blocks run only for the samples whose cache asks for it.

    caches: one a sample, all of one kind. Where all ask, this is `dit.run_blocks(state)` to the bit.
    """
    first = caches[0].probe_blocks
    before = dit.run_blocks(state, stop=first) if first else state.tokens
    computing = [
        cache.decide(
            Probe(
                state.modulation[i : i + 1],
                before[i : i + 1] - state.tokens[i : i + 1] if first else None,
            )
        )
        for i, cache in enumerate(caches)
    ]
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
            next(done) if computes else before[i : i + 1] + cache.residual
            for i, (cache, computes) in enumerate(zip(caches, computing, strict=True))
        ]
    )


def _samples(state: DiTState, chosen: Sequence[int]) -> DiTState:
    """The state of some samples of a batch; by slices, as an index list would wait for the device."""

    def take(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[i : i + 1] for i in chosen])

    image_context = None if state.image_context is None else take(state.image_context)
    return replace(
        state,
        tokens=take(state.tokens),
        time=take(state.time),
        modulation=take(state.modulation),
        context=take(state.context),
        image_context=image_context,
    )
