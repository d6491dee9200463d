"""The stages of a generation as functions of a pipeline's models: texts, reference, denoising, frames."""

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.pipelines.contexts import Contexts, contexts_of, texts_to_encode
from diffsynth.pipelines.denoise import batch_of_two_fits, denoise, guided_velocity, replaced_latents
from diffsynth.pipelines.events import Observer, RunEvent
from diffsynth.pipelines.frames import Video, chunks_to_uint8, video_to_tensor
from diffsynth.pipelines.guidance import make_guide
from diffsynth.pipelines.latency import RunCost, measured
from diffsynth.pipelines.options import GenerationOptions
from diffsynth.schedulers import make_scheduler

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger(__name__)

Frames = list[Image.Image] | np.ndarray | Tensor
# Of (step, timestep, latents [1, C, F, h, w]) -> the latents to go on with.
StepHook = Callable[[int, Tensor, Tensor], Tensor]


def encode_prompts(
    pipe: "WanVideoPipeline", prompts: list[str], negatives: list[str], options: GenerationOptions
) -> list[Contexts]:
    """The text embeddings of each prompt's run, on the device; only those that the run reads."""
    texts = texts_to_encode(prompts, negatives, options.cfg_scale != 1, options.motion is not None)
    flat = [text for group in texts.values() for text in group]
    if pipe.prompter.cached(flat, pipe.text_encoder):
        rows = pipe.prompter.encode_prompt(flat, pipe.text_encoder)
    else:
        with pipe.residency.using("text_encoder"):
            rows = pipe.prompter.encode_prompt(flat, pipe.text_encoder)
    return contexts_of(texts, rows.to(pipe.device))


def encode_video(pipe: "WanVideoPipeline", video: Video, options: GenerationOptions) -> Tensor:
    """The reference as latents [1, C, F, h, w]."""
    pixels = video_to_tensor(video, options.num_frames, options.height, options.width)
    with pipe.residency.using("vae"):
        return pipe.vae.encode(pixels, **_tiling(options))


def denoise_latents(
    pipe: "WanVideoPipeline",
    context: Contexts,
    reference: Tensor | None,
    options: GenerationOptions,
    cost: RunCost,
    *,
    progress: Callable[[Iterable], Iterable],
    on_step_end: StepHook,
    observer: Observer,
) -> Tensor:
    """From noise, or the noised reference, to clean latents [1, C, F, h, w]; what it took goes to `cost`."""
    scheduler = make_scheduler(options.sampler, options.sigma_shift)
    scheduler.set_timesteps(options.num_inference_steps, options.denoising_strength)
    noise = make_noise(pipe, options)
    start = noise if reference is None else scheduler.add_noise(reference, noise, scheduler.timesteps[0])
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
        )

    steps = len(scheduler.timesteps)

    def step_done(index: int, timestep: Tensor, latents: Tensor, clean: Tensor) -> Tensor:
        latents = on_step_end(index, timestep, latents)
        observer(RunEvent(stage="sampling", step=index + 1, steps=steps, latents=latents, clean=clean))
        return latents

    with pipe.residency.using("dit"), measured(cost, pipe.dit, pipe.device):
        batch = options.batch_cfg
        if batch is None:
            batch = batch_of_two_fits(pipe.dit, _num_tokens(pipe, start), pipe.device)
        velocity = guided_velocity(
            pipe.dit,
            context.positive,
            context.negative,
            options.cfg_scale,
            num_steps=steps,
            batch=batch,
            cfg_interval=options.cfg_interval,
            cache=options.cache,
        )
        return denoise(
            start,
            scheduler,
            velocity,
            guide=guide,
            progress=progress,
            on_step_end=step_done,
            interrupted=pipe.interrupted,
        )


def make_noise(pipe: "WanVideoPipeline", options: GenerationOptions) -> Tensor:
    """Float32 noise [1, C, F, h, w] from the seed, drawn on rand_device: devices can start alike."""
    frames = -(-(options.num_frames - 1) // pipe.vae.temporal_factor) + 1
    rows, cols = (side // pipe.vae.spatial_factor for side in (options.height, options.width))
    shape = (1, pipe.dit.in_dim, frames, rows, cols)
    return torch.randn(shape, generator=options.generator(), device=options.rand_device).to(pipe.device)


def decode_latents(pipe: "WanVideoPipeline", latents: Tensor, options: GenerationOptions) -> Frames:
    """Clean latents as a video of options.output_type. Raises RuntimeError if they are not all finite."""
    if not latents.isfinite().all():
        raise RuntimeError(
            f"denoising gave values that are not finite (DiT in {pipe.dit.dtype}); no video is made"
        )
    if options.output_type == "latent":
        return latents
    with pipe.residency.using("vae"):
        if options.output_type == "pt":
            return pipe.vae.decode(latents, num_frames=options.num_frames, **_tiling(options))
        if options.tiled:
            video = pipe.vae.decode(latents, num_frames=options.num_frames, **_tiling(options))
            chunks: Iterable[Tensor] = video.split(pipe.vae.temporal_factor, dim=2)
        else:
            chunks = pipe.vae.decode_chunks(latents)
        frames = chunks_to_uint8(chunks, options.num_frames)
    return frames if options.output_type == "np" else [Image.fromarray(frame) for frame in frames]


def replaced_by(callback: Callable | None, pipe: "WanVideoPipeline") -> StepHook:
    """The hook that a caller's callback_on_step_end is, called with (pipe, step, timestep, {"latents": ...}).

    Raises TypeError or ValueError if it returns what cannot replace the latents.
    """

    def hook(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        returned = None if callback is None else callback(pipe, step, timestep, {"latents": latents})
        return latents if returned is None else replaced_latents(returned, latents)

    return hook


def _tiling(options: GenerationOptions) -> dict:
    return {"tiled": options.tiled, "tile_size": options.tile_size, "tile_stride": options.tile_stride}


def _num_tokens(pipe: "WanVideoPipeline", latents: Tensor) -> int:
    frames, rows, cols = (n // p for n, p in zip(latents.shape[2:], pipe.dit.patch_size, strict=True))
    return frames * rows * cols
