"""A generation from resolved options to frames: encode, sample, decode.

`generate` goes through the stages for each prompt and `sample` through the denoising steps. Where memory runs
out, a stage is done again one rung down the ladder of settings, denoising from its last finished step.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from diffsynth.caches.rules import make_rule
from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import picture_to_tensor
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import GradientMemory
from diffsynth.pipelines.components import Components
from diffsynth.pipelines.decode import Frames, decode_latents, keep_latents, latents_facts
from diffsynth.pipelines.denoise import RunEvent, cfg_velocity, denoise, motion_guide
from diffsynth.pipelines.experts import expert_at
from diffsynth.pipelines.image_condition import encode_pictures
from diffsynth.planning.ladder import Ladder, memory_problem, settings_of, with_settings
from diffsynth.runs.checkpoint import SavedRun
from diffsynth.runs.cost import RunCost, measured
from diffsynth.runs.state import (
    NO_CONDITION,
    ImageCondition,
    PromptEmbeddings,
    RunInputs,
    StepState,
    joined,
    part,
)
from diffsynth.schedulers import FlowMatchScheduler, UniPCScheduler, make_scheduler

T = TypeVar("T")
Observer = Callable[[RunEvent], None]
# Told of each yield of the loop; latents that it returns, after guidance or after a step, replace the run's.
StepConsumer = Callable[[RunEvent], Tensor | None]
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedVideo:
    """A video with its prompts, options and cost.

    Attributes:
        frames: frames of the type that options.output_type names.
        latents: final latents [1, C, F, h, w] of the frames, on the CPU.
        options: the options in force at the end; a lack of memory may have changed some.
    """

    frames: Frames
    latents: Tensor
    prompt: str
    negative_prompt: str
    options: RunOptions
    cost: RunCost


@torch.no_grad()
def generate(
    models: Components,
    prompts: Sequence[tuple[str, str]],
    pixels: Tensor | None,
    options: RunOptions,
    ladder: Ladder,
    *,
    on_step: StepConsumer,
    observer: Observer,
    progress: Progress,
    stop: Callable[[], bool],
    saved: SavedRun | None = None,
    fps: float | None = None,
    pictures: Sequence[Image.Image] = (),
) -> list[GeneratedVideo]:
    """Make a video for each prompt.

    Once stop() is True no further step begins; the latents that there are then become the last video.

    Args:
        models: of the pipeline.
        prompts: (prompt, negative prompt) of each video.
        pixels: the reference [1, 3, T, H, W] in [-1, 1]; None without one.
        options: as resolved; the ladder decides the rest.
        ladder: settings for when memory runs out.
        on_step: consumes what the denoising loop yields, after guidance and after each step.
        observer: told when any other stage begins: encoding texts and video, decoding.
        progress: wraps the range of denoising steps, as tqdm does.
        stop: asked before each step, inside guidance, and after each video.
        saved: where the run is saved as it proceeds, and continued from.
        fps: of the reference, for the file of final latents.
        pictures: those that the video begins and, if there are two, ends with.
    """
    inputs = None if saved is None else saved.inputs
    if inputs is None:
        inputs, options = encode(models, prompts, pixels, pictures, options, ladder, observer)
        if saved is not None:
            saved.keep_inputs(inputs)
    videos: list[GeneratedVideo] = []
    all_steps_done = True
    for index, (prompt, negative_prompt) in enumerate(prompts):
        cost = RunCost(
            options.seed, options.mode, options.num_inference_steps, stage_seconds=dict(inputs.seconds)
        )
        latents = None if saved is None else saved.finished(index, cost)
        if latents is None:
            latents, options, all_steps_done = sample(
                models,
                index,
                inputs,
                options,
                ladder,
                cost,
                on_step=on_step,
                progress=progress,
                stop=stop,
                saved=saved,
            )
            if saved is not None and all_steps_done:
                saved.keep_latents(index, latents, latents_facts(models.vae, options, fps, cost))
        keep = saved is None
        frames, options = _decoded(models, latents, options, ladder, observer, cost, fps, keep)
        videos.append(
            GeneratedVideo(
                frames=frames,
                latents=latents.cpu(),
                prompt=prompt,
                negative_prompt=negative_prompt,
                options=options,
                cost=cost,
            )
        )
        if stop() or not all_steps_done:
            break
    if saved is not None and all_steps_done and len(videos) == len(prompts):
        saved.done()
    return videos


def _decoded(
    models: Components,
    latents: Tensor,
    options: RunOptions,
    ladder: Ladder,
    observer: Observer,
    cost: RunCost,
    fps: float | None,
    keep: bool,
) -> tuple[Frames, RunOptions]:
    """Decode final latents; if that fails and `keep`, they are kept in a file that the error names."""
    try:
        with stage("decode", observer, cost.stage_seconds):
            return with_ladder("decode", partial(decode_latents, models, latents), options, ladder)
    except (RuntimeError, MemoryError, OSError) as error:
        if keep and latents.isfinite().all():
            keep_latents(latents, latents_facts(models.vae, options, fps, cost), [], "fastvmt-latents", error)
        raise


def encode(
    models: Components,
    prompts: Sequence[tuple[str, str]],
    pixels: Tensor | None,
    pictures: Sequence[Image.Image],
    options: RunOptions,
    ladder: Ladder,
    observer: Observer,
) -> tuple[RunInputs, RunOptions]:
    """Encode the texts that the run reads, the reference and the pictures, and draw the noise.

    Returns:
        The inputs of denoising, and the options in force afterwards.
    """
    texts = {"positive": [prompt for prompt, _ in prompts]}
    if options.cfg_scale != 1 or options.low_noise_cfg_scale not in (1, None):
        texts["negative"] = [negative_prompt for _, negative_prompt in prompts]
    if options.motion is not None:
        texts["null"] = [""] * len(prompts)
    seconds: dict[str, float] = {}

    def encode_texts(_options: RunOptions) -> list[PromptEmbeddings]:
        flat = [text for group in texts.values() for text in group]
        cached = models.prompter.cached(flat, models.text_encoder)
        with nullcontext() if cached else models.residency.using("text_encoder"):
            rows = models.prompter.encode_prompt(flat, models.text_encoder).to(models.device)
        groups = [group.split(1) for group in rows.split(len(prompts))]
        return [PromptEmbeddings(**dict(zip(texts, row, strict=True))) for row in zip(*groups, strict=True)]

    def encode_video(pixels: Tensor, options: RunOptions) -> Tensor:
        with models.residency.using("vae"):
            return models.vae.encode(pixels, **options.tiling)

    def encode_images(own: list[Tensor], fitted: list[Tensor]) -> tuple[ImageCondition, RunOptions]:
        return with_ladder("encode video", partial(encode_pictures, models, own, fitted), options, ladder)

    with stage("encode text", observer, seconds):
        embeddings, options = with_ladder("encode text", encode_texts, options, ladder)
    reference = None
    if pixels is not None:
        with stage("encode video", observer, seconds):
            reference, options = with_ladder("encode video", partial(encode_video, pixels), options, ladder)
    conditions = [NO_CONDITION, NO_CONDITION]
    if pictures:
        fitted = [picture_to_tensor(picture, options.height, options.width) for picture in pictures]
        conditions[0], options = encode_images([picture_to_tensor(picture) for picture in pictures], fitted)
        if pixels is not None:
            ends = [pixels[:, :, 0], pixels[:, :, -1]][: len(pictures)]
            conditions[1], options = encode_images(ends, ends)
    inputs = RunInputs(
        prompts=embeddings,
        noise=draw_noise(models, options),
        reference=reference,
        seconds=seconds,
        condition=conditions[0],
        reference_condition=conditions[1],
    )
    return inputs, options


def draw_noise(models: Components, options: RunOptions) -> Tensor:
    """Return float32 noise [1, C, F, h, w] from the seed, drawn on rand_device so that devices start alike.

    Raises:
        ValueError: rand_device draws no numbers here.
    """
    frames = -(-(options.num_frames - 1) // models.vae.temporal_factor) + 1
    rows, cols = (side // models.vae.spatial_factor for side in (options.height, options.width))
    shape = (1, models.vae.z_dim, frames, rows, cols)
    generator = noise_generator(options)
    noise = torch.randn(shape, generator=generator, device=options.rand_device, dtype=torch.float32)
    return noise.to(models.device)


def checked_callables(
    progress_bar_cmd: Progress | None, observer: Observer | None, callback_on_step_end: object
) -> tuple[Progress, Observer]:
    """Return progress bar and observer, or what does nothing for None.

    Raises:
        TypeError: an argument can be neither called nor is None; the message names it.
    """
    for name, call in locals().copy().items():
        if call is not None and not callable(call):
            raise TypeError(f"{name} must be a function or None; got {call!r:.80}")
    return progress_bar_cmd or iter, observer or (lambda _event: None)


def noise_generator(options: RunOptions) -> torch.Generator:
    """Return a new random generator of the run's noise; ValueError if rand_device has none."""
    try:
        return torch.Generator(options.rand_device).manual_seed(options.seed)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"rand_device is {options.rand_device!r}, which draws no numbers here ({error})"
        ) from error


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
    """Denoise the latents of one prompt, from noise or the noised reference.

    Of two experts, the first's weights go before the second's come, after the last step of the first. If
    memory runs out, denoising continues after the last finished step, one rung down the ladder; at its end
    `Ladder.next` raises. `event.step` of a sampling event counts the finished steps; a sampling event is
    interrupted if stop() became True during the step, whose guidance may then be cut short.

    Args:
        index: index (0-based) of the prompt.
        cost: receives the cost of the prompt.
        saved: saves finished steps; its unfinished run is continued.

    Returns:
        Latents [1, C, F, h, w], the options in force at the end, and whether all steps were done.
    """
    finished = None if saved is None else saved.begun(index)
    if finished is not None:
        cost.restore(finished.cost)
        options = with_settings(options, finished.settings)
    guided_steps = 0 if options.motion is None else options.motion.guided_steps
    at_start = cost.state()
    bar = iter(progress(range(0 if finished is None else finished.step, options.num_inference_steps)))
    next(bar, None)  # shows the bar
    while True:
        # The time of a failed attempt is part of the cost; the losses of its unfinished step are not.
        found = at_start if finished is None else finished.cost
        cost.restore({**found, "time_gen": cost.time_gen, "dit_block_calls": cost.dit_block_calls})
        failing = "sampling"
        scheduler = scheduler_of(options)
        done = 0 if finished is None else finished.step
        expert, phase = expert_at(
            models, scheduler.timesteps, min(done, options.num_inference_steps - 1), options.boundary
        )
        try:
            dit = getattr(models, expert)
            with models.residency.using(expert), measured(cost, dit, models.device) as elapsed:
                latents, steps, parts = begin_denoising(
                    dit,
                    scheduler,
                    phase,
                    index,
                    inputs,
                    expert_options(options, expert),
                    cost,
                    stop,
                    finished,
                )
                with suppress(StopIteration):
                    failing = "guidance" if done < guided_steps else "sampling"
                    event = next(steps)
                    while True:
                        replaced = on_step(event)
                        assert event.latents is not None  # of a step there are
                        latents = event.latents if replaced is None else replaced
                        if event.stage == "sampling" and not event.interrupted:
                            finished = StepState(
                                step=event.step,
                                latents=latents,
                                parts=joined(
                                    {name: remembering.state() for name, remembering in parts.items()}
                                ),
                                cost={**cost.state(), "time_gen": elapsed()},
                                settings=settings_of(options),
                            )
                            if saved is not None:
                                saved.step_done(finished)
                            next(bar, None)
                        guided_next = event.stage == "sampling" and event.step < guided_steps
                        failing = "guidance" if guided_next else "sampling"
                        event = steps.send(replaced)
            done = 0 if finished is None else finished.step
            if done == phase.stop < options.num_inference_steps:
                continue
            return latents, options, done == options.num_inference_steps
        except (RuntimeError, MemoryError) as error:
            problem = memory_problem(error)
        # Outside of the except block nothing holds the failed attempt's frames and their tensors any more.
        options = ladder.next(failing, options, problem)


def scheduler_of(options: RunOptions) -> FlowMatchScheduler | UniPCScheduler:
    """Return a new scheduler with the timesteps of a run."""
    scheduler = make_scheduler(options.sampler, options.sigma_shift)
    scheduler.set_timesteps(options.num_inference_steps, options.denoising_strength)
    return scheduler


def expert_options(options: RunOptions, expert: str) -> RunOptions:
    """Return the options with which an expert denoises: the low-noise one may have its own cfg_scale."""
    if expert != "low_noise_dit" or options.low_noise_cfg_scale is None:
        return options
    return replace(options, cfg_scale=options.low_noise_cfg_scale)


def begin_denoising(
    dit: WanModel,
    scheduler: FlowMatchScheduler | UniPCScheduler,
    phase: range,
    index: int,
    inputs: RunInputs,
    options: RunOptions,
    cost: RunCost,
    stop: Callable[[], bool],
    finished: StepState | None,
) -> tuple[Tensor, Generator[RunEvent, Tensor | None, None], dict[str, Any]]:
    """Set up the denoising of one prompt by a DiT, from its start or from its last finished step.

    Args:
        scheduler: new, with the timesteps of the run.
        phase: steps of the run that this DiT denoises; step caches and gradient memory are its own.

    Returns:
        The first latents [1, C, F, h, w], the generator of steps, and by name the parts that keep state from
        step to step: scheduler, gradient memory, and the step cache's rule of each prompt.
    """
    prompt, motion, num_steps = inputs.prompts[index], options.motion, options.num_inference_steps
    start, first_frame = inputs.noise, inputs.condition.first_frame
    if inputs.reference is not None:
        clean = inputs.reference
        if first_frame is not None:
            clean = torch.cat([first_frame.to(clean), clean[:, :, 1:]], dim=2)
        start = scheduler.add_noise(clean, inputs.noise, scheduler.timesteps[0])
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
        guided_steps=0 if motion is None else motion.guided_steps,
        condition=inputs.condition,
        first=0 if finished is None else finished.step,
        end=phase.stop,
        stop=stop,
    )
    return latents, steps, parts


def with_ladder(
    stage_name: str, attempt: Callable[[RunOptions], T], options: RunOptions, ladder: Ladder
) -> tuple[T, RunOptions]:
    """Attempt a stage, and repeat it one rung down the ladder each time that memory runs out.

    Returns:
        The stage's result, and the options in force afterwards.
    """
    while True:
        try:
            return attempt(options), options
        except (RuntimeError, MemoryError) as error:
            problem = memory_problem(error)
        options = ladder.next(stage_name, options, problem)


@contextmanager
def stage(name: str, observer: Observer, seconds: dict[str, float]) -> Iterator[None]:
    """Notify the observer that a stage begins, and store the seconds that the stage took."""
    observer(RunEvent(stage=name))
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - started
