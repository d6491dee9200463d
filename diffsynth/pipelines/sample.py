"""Denoise one prompt: switch from one expert to the next, and retry a step when memory runs out."""

from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diffsynth.caches.rules import make_rule
from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import finite
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import GradientMemory
from diffsynth.pipelines.components import Components
from diffsynth.pipelines.denoise import RunEvent, cfg_velocity, denoise, motion_guide
from diffsynth.pipelines.experts import expert_at
from diffsynth.planning.ladder import Ladder, memory_problem, settings_of, with_settings
from diffsynth.runs.checkpoint import SavedRun
from diffsynth.runs.cost import RunCost, measured
from diffsynth.runs.state import RunInputs, StepState, joined, part
from diffsynth.schedulers import FlowMatchScheduler, run_scheduler

# Called with each event of the loop; latents that it returns for a sampling event replace the run's.
StepConsumer = Callable[[RunEvent], Tensor | None]
Progress = Callable[[Iterable[int]], Iterable[int]]


def sample(
    models: Components,
    index: int,
    inputs: RunInputs,
    options: RunOptions,
    ladder: Ladder,
    cost: RunCost,
    *,
    on_step: StepConsumer,
    progress: Progress,
    stop: Callable[[], bool],
    saved: SavedRun | None,
) -> tuple[Tensor, RunOptions, bool]:
    """Denoise the latents of one prompt, from noise or the noised reference, and add up its cost.

    With offload, an expert leaves the device after its last step. If memory runs out, denoising continues
    after the last finished step, one rung down the ladder; if no rung is left, `Ladder.next` raises.

    Returns:
        Latents [1, C, F, h, w], the options in force at the end, and whether all steps were done.
    """
    finished = None if saved is None else saved.begun(index)
    if finished is not None:
        cost.restore(finished.cost)
        options = ladder.lowered(with_settings(options, finished.settings))
    guided = options.guided
    at_start = cost.state()
    shown = progress(range(0 if finished is None else finished.step, options.num_inference_steps))
    if not isinstance(shown, Iterable):
        raise TypeError(f"progress_bar_cmd must return what it wraps, as tqdm does; got {shown!r:.80}")
    bar = iter(shown)
    next(bar, None)  # shows the bar
    while True:
        # The time of a failed attempt is part of the cost; the losses of its unfinished step are not.
        found = at_start if finished is None else finished.cost
        cost.restore({**found, "time_gen": cost.time_gen, "dit_block_calls": cost.dit_block_calls})
        done = 0 if finished is None else finished.step
        scheduler = run_scheduler(options)
        expert, phase = expert_at(models, scheduler.timesteps, done, options.boundary)
        own = options if expert == "dit" else options.of_low_noise
        failing = "guidance" if done in guided else "sampling"
        dit = getattr(models, expert)
        try:
            with models.residency.using(expert), measured(cost, dit, models.device) as elapsed:
                latents, steps, parts = begin_denoising(
                    dit, scheduler, phase, index, inputs, own, cost, stop, finished
                )
                with suppress(StopIteration):
                    event = next(steps)
                    while True:
                        assert event.latents is not None  # every event of a step has them
                        replaced = on_step(event)
                        latents = event.latents if replaced is None else replaced
                        if event.stage == "sampling" and not event.interrupted:
                            if event.step == done + 1:  # checks wait for the device; decode.py checks the end
                                finite(event.latents, f"the DiT in denoising step {event.step}")
                            finished = StepState(
                                step=event.step,
                                latents=latents,
                                parts=joined({name: kept.state() for name, kept in parts.items()}),
                                cost={**cost.state(), "time_gen": elapsed()},
                                settings=settings_of(options),
                            )
                            if saved is not None:
                                saved.step_done(finished)
                            next(bar, None)
                        more = event.stage == "sampling" and event.step in guided
                        failing = "guidance" if more else "sampling"
                        event = steps.send(replaced)
            done = 0 if finished is None else finished.step
            if done == phase.stop < options.num_inference_steps:
                continue
            return latents, options, done == options.num_inference_steps
        except (RuntimeError, MemoryError) as error:
            problem = memory_problem(error)
        # Outside of the except block, no traceback keeps the tensors of the failed attempt alive.
        options = ladder.next(failing, options, problem)


def begin_denoising(
    dit: WanModel,
    scheduler: FlowMatchScheduler,
    phase: range,
    index: int,
    inputs: RunInputs,
    options: RunOptions,
    cost: RunCost,
    stop: Callable[[], bool],
    finished: StepState | None,
) -> tuple[Tensor, Generator[RunEvent, Tensor | None, None], dict[str, Any]]:
    """Set up the denoising of one prompt with one DiT, from the start or from the last finished step.

    Returns:
        The first latents [1, C, F, h, w], the generator of steps, and the stateful parts by name: scheduler,
        gradient memory, and the step cache's rule for each prompt.
    """
    prompt, motion, num_steps = inputs.prompts[index], options.motion, options.num_inference_steps
    start, first_frame = inputs.noise, inputs.condition.first_frame
    if inputs.reference is not None:
        clean = inputs.reference
        if first_frame is not None:
            clean = torch.cat([first_frame.to(clean), clean[:, :, 1:]], dim=2)
        start = scheduler.add_noise(clean, inputs.noise, scheduler.timesteps[0])
    start = inputs.condition.hold(start)
    rules = {}
    if options.cache is not None:
        guided = options.cfg_steps
        negative = range(max(phase.start, guided.start), min(phase.stop, guided.stop))
        cached = {"positive": phase, "negative": negative}
        rules = {
            name: make_rule(options.cache, name, steps, num_steps) for name, steps in cached.items() if steps
        }
    memory = GradientMemory(motion) if motion is not None and motion.recompute_every > 1 else None
    parts: dict[str, Any] = {"scheduler": scheduler, **({"memory": memory} if memory else {})}
    parts |= {f"rules.{name}": rule for name, rule in rules.items()}
    if finished is not None:
        for name, remembering in parts.items():
            if name == "scheduler" or finished.step > phase.start:
                remembering.restore(part(finished.parts, name))
    guide = None
    if motion is not None:
        guide = motion_guide(dit, prompt, inputs, motion, scheduler, start, cost, memory=memory, stop=stop)
    latents = start if finished is None else finished.latents
    steps = denoise(
        latents,
        scheduler,
        cfg_velocity(dit, prompt, options, rules, inputs.condition),
        guide,
        guided=options.guided,
        condition=inputs.condition,
        first=0 if finished is None else finished.step,
        end=phase.stop,
        stop=stop,
    )
    return latents, steps, parts
