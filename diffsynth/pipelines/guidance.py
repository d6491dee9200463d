"""Motion guidance in a denoising run: which guidance the arguments ask for, and the hook that applies it."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import GradientMemory, MotionGuidance, NonFiniteGuidanceError, guided_step
from diffsynth.pipelines.events import Observer, RunEvent, unobserved
from diffsynth.runs.cost import RunCost
from diffsynth.schedulers import FlowMatchScheduler, UniPCScheduler
from diffsynth.vram_management import synchronize

logger = logging.getLogger(__name__)

NO_TRANSFER = "No_transfer"
DEFAULT_MODE = "effi_AMF"
NONE_DECLARED: Mapping[str, Mapping[str, object]] = MappingProxyType({})


def choose_guidance(
    mode: str | None,
    motion: MotionGuidance | None,
    sf: int | None,
    num_frames: int | None,
    num_steps: int,
    declared: Mapping[str, Mapping[str, object]] = NONE_DECLARED,
) -> MotionGuidance | None:
    """The guidance that mode, motion and sf ask for together; None for no transfer.

    num_frames: of the reference, None without one. num_steps: of the run; more guided steps are clamped with
    a warning. declared: numbers of each mode that the checkpoint asks for. Raises ValueError if motion is to
    be transferred and there is no reference, or one of a single frame.
    """
    if mode is None and motion is None:
        mode = NO_TRANSFER if num_frames is None else DEFAULT_MODE
        logger.info("no mode is named: %s", mode)
    if mode == NO_TRANSFER:
        if motion is not None or sf is not None:
            logger.warning("motion and sf have no effect in mode %s", NO_TRANSFER)
        return None
    guidance = motion or MotionGuidance.for_mode(mode, declared.get(mode, {}))
    changes = {"mode": mode, "sf": sf}
    guidance = replace(guidance, **{name: value for name, value in changes.items() if value is not None})
    if num_frames is None:
        raise ValueError(f"mode {guidance.mode!r} transfers motion and needs input_video; none is given")
    if num_frames < 2:
        raise ValueError(f"mode {guidance.mode!r} needs 2 frames or more of input_video; it has 1")
    if guidance.guided_steps > num_steps:
        logger.warning("guided_steps=%d: the run has only %d steps", guidance.guided_steps, num_steps)
        guidance = replace(guidance, guided_steps=num_steps)
    return guidance


def gradient_memory(guidance: MotionGuidance | None) -> GradientMemory | None:
    """The memory of a run whose guided steps may repeat gradients of earlier ones; None for others."""
    return GradientMemory(guidance) if guidance is not None and guidance.recompute_every > 1 else None


def make_guide(
    dit: WanModel,
    guidance: MotionGuidance,
    scheduler: FlowMatchScheduler | UniPCScheduler,
    *,
    start: Tensor,
    reference: Tensor,
    noise: Tensor,
    context: Tensor,
    null_context: Tensor,
    cost: RunCost,
    observer: Observer = unobserved,
    interrupted: Callable[[], bool],
    memory: GradientMemory | None = None,
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """The `guide` of `denoise`: moves the latents before each of the first `guided_steps` steps.

    start: the run's first latents; reference: clean latents; noise: the run's own, all [1, C, F, h, w];
    context and null_context [1, L, text_dim]. Seconds, losses and gradient evaluations are added to `cost`.
    memory: see `gradient_memory`; None computes the gradients of every guided step.
    """

    def guide(index: int, timestep: Tensor, latents: Tensor) -> Tensor:
        if index >= guidance.guided_steps:
            return latents
        started = time.perf_counter()
        try:
            latents, record = guided_step(
                dit,
                latents,
                reference=reference,
                noise=noise,
                sigma=scheduler.sigmas[index].item(),
                timestep=timestep,
                context=context,
                null_context=null_context,
                guidance=guidance.faded(index),
                start=(start, scheduler.sigmas[0].item()),
                interrupted=interrupted,
                memory=memory,
            )
        except NonFiniteGuidanceError as error:
            raise NonFiniteGuidanceError(f"denoising step {index}: {error}", error.latents) from error
        synchronize(latents.device)
        cost.time_guidance.append(time.perf_counter() - started)
        cost.gradient_evaluations += record.gradient_evaluations
        cost.losses.append(record.losses)
        losses = "loss " + " -> ".join(f"{loss:.4g}" for loss in record.losses)
        done = losses if record.losses else "gradients of an earlier step"
        logger.info("guided step %d of %d: %s", index + 1, guidance.guided_steps, done)
        observer(
            RunEvent(
                stage="guidance",
                step=index + 1,
                steps=guidance.guided_steps,
                losses=record.losses,
                latents=latents,
            )
        )
        return latents

    return guide
