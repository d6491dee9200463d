"""The denoising of one prompt: scheduler, guidance, velocity and step caches put together, from the start or
from a saved step, and again from the last finished step where memory runs out.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from diffsynth.caches.rules import RunRules
from diffsynth.configs.options import RunOptions
from diffsynth.pipelines.denoise import (
    Velocity,
    batch_of_two_fits,
    denoise,
    guided_velocity,
    replaced_latents,
)
from diffsynth.pipelines.events import Observer, RunEvent
from diffsynth.pipelines.guidance import gradient_memory, make_guide
from diffsynth.planning.ladder import MemoryFallbacks, settings_of, with_settings
from diffsynth.runs.contexts import Contexts
from diffsynth.runs.cost import RunCost, measured
from diffsynth.runs.state import RunInputs, StepState, joined, part
from diffsynth.schedulers import FlowMatchScheduler, UniPCScheduler, make_scheduler

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

# Of (step, timestep, latents [1, C, F, h, w]) -> the latents to go on with.
StepHook = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What a caller watches a run with, and steers it: a progress bar over the steps, a function called after
    each step (see `replaced_by`), an observer of stages and steps.
    """

    progress: Callable[[Iterable], Iterable]
    on_step_end: StepHook
    observer: Observer


@dataclass(frozen=True, kw_only=True, slots=True)
class _Solvers:
    """What moves the latents of one attempt. parts: those that remember steps, named as in `StepState`."""

    scheduler: FlowMatchScheduler | UniPCScheduler
    start: Tensor
    guide: Callable[[int, Tensor, Tensor], Tensor] | None
    velocity: Velocity
    parts: dict


@dataclass(slots=True)
class _Reached:
    """How far a denoising has come: what it is in the middle of, and its last finished step."""

    stage: str
    state: StepState | None


def denoise_latents(
    pipe: "WanVideoPipeline",
    context: Contexts,
    inputs: RunInputs,
    fit: MemoryFallbacks,
    cost: RunCost,
    *,
    begun: StepState | None,
    step_done: Callable[[StepState], None],
    hooks: Hooks,
) -> tuple[Tensor, bool]:
    """From noise, or the noised reference, to clean latents [1, C, F, h, w], and whether all steps were done;
    what it took goes to `cost`.

    begun: where to go on; None for the start. step_done: told of each finished step. Where memory runs out,
    `fit` has it go on after the last finished step.
    """
    if begun is not None:
        cost.restore(begun.cost)
        fit.options = with_settings(fit.options, begun.settings)
    if fit.options.batch_cfg is None:
        batch = batch_of_two_fits(pipe.dit, _num_tokens(pipe, inputs.noise), pipe.device)
        fit.options = replace(fit.options, batch_cfg=batch)
    reached = _Reached(stage="sampling", state=begun)
    at_start = cost.state()

    def keep(state: StepState) -> None:
        reached.state = state
        step_done(state)

    def attempt(options: RunOptions) -> Tensor:
        # What a failed attempt took is part of the cost; what it found in its last step is not.
        found = at_start if reached.state is None else reached.state.cost
        cost.restore({**found, "time_gen": cost.time_gen, "dit_block_calls": cost.dit_block_calls})
        with pipe.residency.using("dit"), measured(cost, pipe.dit, pipe.device):
            solvers = _make_solvers(pipe, context, inputs, options, cost, hooks.observer)
            return _denoise_on(pipe, solvers, options, cost, reached, keep, hooks)

    latents = fit.run(lambda: reached.stage, attempt)
    return latents, reached.state is not None and reached.state.step == fit.options.num_inference_steps


def _make_solvers(
    pipe: "WanVideoPipeline",
    context: Contexts,
    inputs: RunInputs,
    options: RunOptions,
    cost: RunCost,
    observer: Observer,
) -> _Solvers:
    scheduler = make_scheduler(options.sampler, options.sigma_shift)
    scheduler.set_timesteps(options.num_inference_steps, options.denoising_strength)
    noise, reference = inputs.noise, inputs.reference
    start = noise if reference is None else scheduler.add_noise(reference, noise, scheduler.timesteps[0])
    memory = gradient_memory(options.motion)
    rules = None if options.cache is None else RunRules(options.cache)
    guide = None
    if options.motion is not None:
        guide = make_guide(
            pipe.dit,
            options.motion,
            scheduler,
            start=start,
            reference=reference,
            noise=noise,
            context=context.positive,
            null_context=context.null,
            cost=cost,
            observer=observer,
            interrupted=pipe.interrupted,
            memory=memory,
        )
    velocity = guided_velocity(
        pipe.dit,
        context.positive,
        context.negative,
        options.cfg_scale,
        num_steps=len(scheduler.timesteps),
        batch=options.batch_cfg,
        cfg_interval=options.cfg_interval,
        cache=rules,
    )
    parts = {"scheduler": scheduler, "memory": memory, "rules": rules}
    parts = {name: holder for name, holder in parts.items() if holder is not None}
    return _Solvers(scheduler=scheduler, start=start, guide=guide, velocity=velocity, parts=parts)


def _denoise_on(
    pipe: "WanVideoPipeline",
    solvers: _Solvers,
    options: RunOptions,
    cost: RunCost,
    reached: _Reached,
    keep: Callable[[StepState], None],
    hooks: Hooks,
) -> Tensor:
    """The steps after the last finished one."""
    begun, steps = reached.state, len(solvers.scheduler.timesteps)
    if begun is not None:
        for name, holder in solvers.parts.items():
            holder.restore(part(begun.parts, name))
    started = time.perf_counter()

    def guided(index: int, timestep: Tensor, latents: Tensor) -> Tensor:
        reached.stage = "guidance"
        latents = solvers.guide(index, timestep, latents)
        reached.stage = "sampling"
        return latents

    def on_step_end(index: int, timestep: Tensor, latents: Tensor, clean: Tensor) -> Tensor:
        latents = hooks.on_step_end(index, timestep, latents)
        hooks.observer(RunEvent(stage="sampling", step=index + 1, steps=steps, latents=latents, clean=clean))
        return latents

    def step_done(step: int, latents: Tensor) -> None:
        seconds = cost.time_gen + time.perf_counter() - started
        keep(
            StepState(
                step=step,
                latents=latents,
                parts=joined({name: holder.state() for name, holder in solvers.parts.items()}),
                cost={**cost.state(), "time_gen": seconds},
                settings=settings_of(options),
            )
        )

    return denoise(
        solvers.start if begun is None else begun.latents,
        solvers.scheduler,
        solvers.velocity,
        guide=None if solvers.guide is None else guided,
        progress=hooks.progress,
        on_step_end=on_step_end,
        interrupted=pipe.interrupted,
        first_step=0 if begun is None else begun.step,
        step_done=step_done,
    )


def replaced_by(callback: Callable | None, pipe: "WanVideoPipeline") -> StepHook:
    """The hook that a caller's callback_on_step_end is, called with (pipe, step, timestep, {"latents": ...}).

    Raises TypeError or ValueError if it returns what cannot replace the latents.
    """

    def hook(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        returned = None if callback is None else callback(pipe, step, timestep, {"latents": latents})
        return latents if returned is None else replaced_latents(returned, latents)

    return hook


def _num_tokens(pipe: "WanVideoPipeline", latents: Tensor) -> int:
    frames, rows, cols = (n // p for n, p in zip(latents.shape[2:], pipe.dit.patch_size, strict=True))
    return frames * rows * cols
