"""The denoising loop: a generator of steps, and the velocity and guidance that it steps with.

Axes: C channels, F latent frames, h/w latent rows and columns, L text tokens.
"""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffsynth.caches.rules import StepCache, run_blocks_cached
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import RunOptions
from diffsynth.models.conditions import NO_CONDITION, ImageCondition
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import GradientMemory, NonFiniteGuidanceError, guided_step
from diffsynth.runs.cost import RunCost
from diffsynth.runs.state import PromptEmbeddings, RunInputs
from diffsynth.schedulers import FlowMatchScheduler
from diffsynth.vram_management import synchronize

Velocity = Callable[[int, Tensor, Tensor], Tensor]  # (step, latents [1, C, F, h, w], timestep) -> v
# (step, latents, timestep) -> the guided latents that the step begins with, and the optimiser's losses.
Guide = Callable[[int, Tensor, Tensor], tuple[Tensor, tuple[float, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEvent:
    """Event of a run: a stage begins, or a step of it is done.

    Attributes:
        stage: "encode text", "encode video", "guidance" and "sampling", which alternate, or "decode".
        step: number of finished steps of the stage; 0 where it begins.
        steps: number of steps of the stage; 0 where it begins.
        latents: latents of the run [1, C, F, h, w] after the step, not to be changed in place.
        timestep: timestep of the denoising step, from 0 to 1000.
        losses: losses of the fresh gradients of a guided step.
        clean: clean latents that the step's velocity predicts, for a preview; None if unknown.
        reference: its frames as the model sees them, [1, 3, T, H, W], where "encode video" begins.
        interrupted: the loop was asked to stop during the step, so that a run cannot continue from it.
    """

    stage: str
    step: int = 0
    steps: int = 0
    latents: Tensor | None = None
    timestep: Tensor | None = None
    losses: tuple[float, ...] = ()
    clean: Tensor | None = None
    reference: Tensor | None = None
    interrupted: bool = False

    @property
    def words(self) -> str:
        """The present work as progress bars show it: "guided 3/10, motion loss -37%"."""
        if self.stage != "guidance":
            return self.stage
        text = f"guided {self.step}/{self.steps}"
        if len(self.losses) > 1 and self.losses[0]:
            # Of this step's own losses: those of other noise levels do not compare.
            text += f", motion loss {self.losses[-1] / self.losses[0] - 1:+.0%}"
        return text


def denoise(
    latents: Tensor,
    scheduler: FlowMatchScheduler,
    velocity: Velocity,
    guide: Guide | None = None,
    *,
    guided: range = range(0),
    condition: ImageCondition = NO_CONDITION,
    first: int = 0,
    end: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[RunEvent, Tensor | None, None]:
    """Denoise latents through the timesteps of a scheduler.

    Args:
        latents: [1, C, F, h, w] before step `first`.
        scheduler: a scheduler with its timesteps set.
        velocity: returns the DiT's prediction.
        guide: moves the latents before each guided step.
        guided: indices of the guided steps.
        condition: its first frame is kept, in the models that have it so.
        first: index (0-based) of the first step; end: of the one before which the loop ends, if not the last.
        stop: asked before each step; once it returns True, no further step begins.

    Yields:
        An event after each step, and in a guided step another one when its guidance is done. Latents that are
        sent back after a step replace the run's.
    """
    steps = len(scheduler.timesteps)
    latents = condition.hold(latents)
    for index in range(first, steps if end is None else end):
        if stop():
            return
        timestep = scheduler.timesteps[index]
        if guide is not None and index in guided:
            latents, losses = guide(index, latents, timestep)
            yield RunEvent(
                stage="guidance",
                step=guided.index(index) + 1,
                steps=len(guided),
                latents=latents,
                timestep=timestep,
                losses=losses,
            )
        interrupted = stop()
        v = velocity(index, latents, timestep)
        clean, latents = latents - v * (timestep / 1000), scheduler.step(v, timestep, latents)
        clean, latents = condition.hold(clean), condition.hold(latents)
        replaced = yield RunEvent(
            stage="sampling",
            step=index + 1,
            steps=steps,
            latents=latents,
            timestep=timestep,
            clean=clean,
            interrupted=interrupted,
        )
        latents = latents if replaced is None else condition.hold(replaced)


def dit_velocity(
    dit: WanModel,
    x: Tensor,
    timestep: Tensor,
    context: Tensor,
    caches: Sequence[StepCache] = (),
    condition: ImageCondition = NO_CONDITION,
) -> Tensor:
    """Call the DiT once, for latents x [B, C, F, h, w] at one timestep."""
    given = condition.of_dit(timestep.reshape(1), x.shape[0], x.shape[2])
    if not caches:
        return dit(x, context=context, **given)
    state = dit.embed(x, context=context, **given)
    return dit.unembed(run_blocks_cached(dit, state, caches), state)


def cfg_velocity(
    dit: WanModel,
    prompt: PromptEmbeddings,
    options: RunOptions,
    rules: Mapping[str, StepCache],
    condition: ImageCondition = NO_CONDITION,
) -> Velocity:
    """Return the velocity v_neg + cfg_scale * (v_pos - v_neg) as a function of (step, latents, timestep).

    In steps outside of cfg_interval the positive prompt runs alone. Whether the prompts share a call of the
    DiT (options.batch_cfg) does not change the decisions of the rules.
    """
    positive, negative = prompt.positive, prompt.negative
    guided = options.cfg_steps if negative is not None else range(0)
    pos_cache = [rules["positive"]] if "positive" in rules else []
    neg_cache = [rules["negative"]] if "negative" in rules else []
    both = torch.cat([positive, negative]) if negative is not None and guided and options.batch_cfg else None

    def velocity(step: int, x: Tensor, t: Tensor) -> Tensor:
        if negative is None or step not in guided:
            return dit_velocity(dit, x, t, positive, pos_cache, condition)
        if both is not None:
            x = x.expand(2, -1, -1, -1, -1)
            v_pos, v_neg = dit_velocity(dit, x, t, both, pos_cache + neg_cache, condition).chunk(2)
        else:
            v_pos = dit_velocity(dit, x, t, positive, pos_cache, condition)
            v_neg = dit_velocity(dit, x, t, negative, neg_cache, condition)
        return v_neg + options.cfg_scale * (v_pos - v_neg)

    return velocity


def motion_guide(
    dit: WanModel,
    prompt: PromptEmbeddings,
    inputs: RunInputs,
    guidance: MotionGuidance,
    scheduler: FlowMatchScheduler,
    start: Tensor,
    cost: RunCost,
    *,
    memory: GradientMemory | None,
    stop: Callable[[], bool],
) -> Guide:
    """Return the guide that moves latents towards the motion of the reference, which `inputs` must have."""
    reference, null_context = inputs.reference, prompt.null
    if reference is None or null_context is None:
        raise ValueError("motion guidance needs a reference and the empty prompt")

    def guide(index: int, latents: Tensor, timestep: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        synchronize(latents.device)  # the step before is none of guidance's time
        started, sigma = time.perf_counter(), scheduler.sigmas[index].item()
        try:
            moved, record = guided_step(
                dit,
                latents,
                reference=reference,
                noise=inputs.noise,
                sigma=sigma,
                timestep=timestep,
                context=prompt.positive,
                null_context=null_context,
                guidance=guidance.faded(index, sigma),
                start=(start, scheduler.sigmas[0].item()),
                condition=inputs.condition,
                reference_condition=inputs.reference_condition,
                stop=stop,
                memory=memory,
            )
        except NonFiniteGuidanceError as error:
            told = f"{error}; the DiT is in {dit.dtype}: try float32, no LoRAs, or a lower motion_scale"
            raise NonFiniteGuidanceError(f"denoising step {index}: {told}", error.latents) from error
        cost.add_guidance(time.perf_counter() - started, record)
        return moved, record.losses

    return guide


def replaced_latents(returned: object, latents: Tensor) -> Tensor:
    """Return the latents in the return value of a callback.

    Raises:
        TypeError, ValueError: it holds no latents, or latents of another shape than the run's.
    """
    if not isinstance(returned, dict) or not isinstance(returned.get("latents"), Tensor):
        raise TypeError(f"callback_on_step_end must return None or a dict with latents; got {returned!r:.80}")
    if returned["latents"].shape != latents.shape:
        shapes = f"{tuple(returned['latents'].shape)} for {tuple(latents.shape)}"
        raise ValueError(f"callback_on_step_end returned latents of another shape: {shapes}")
    return returned["latents"]
