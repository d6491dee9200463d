"""The stages of a generation but denoising, as functions of a pipeline's models: texts, reference, frames."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import Video, chunks_to_uint8, video_to_tensor
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.runs.contexts import Contexts, contexts_of, texts_to_encode

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

Frames = list[Image.Image] | np.ndarray | Tensor


def encode_prompts(
    pipe: "WanVideoPipeline", prompts: list[str], negatives: list[str], options: RunOptions
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


def encode_video(pipe: "WanVideoPipeline", video: Video, options: RunOptions) -> Tensor:
    """The reference as latents [1, C, F, h, w]."""
    pixels = video_to_tensor(video, options.num_frames, options.height, options.width)
    with pipe.residency.using("vae"):
        return pipe.vae.encode(pixels, **_tiling(options))


def make_noise(pipe: "WanVideoPipeline", options: RunOptions) -> Tensor:
    """Float32 noise [1, C, F, h, w] from the seed, drawn on rand_device: devices can start alike."""
    frames = -(-(options.num_frames - 1) // pipe.vae.temporal_factor) + 1
    rows, cols = (side // pipe.vae.spatial_factor for side in (options.height, options.width))
    shape = (1, pipe.dit.in_dim, frames, rows, cols)
    return torch.randn(shape, generator=options.generator(), device=options.rand_device).to(pipe.device)


class DecodingOptions(Protocol):
    """What decoding reads of `RunOptions`."""

    num_frames: int
    output_type: str
    tiled: bool
    tile_size: tuple[int, int]
    tile_stride: tuple[int, int]


def decode_latents(pipe: "WanVideoPipeline", latents: Tensor, options: RunOptions) -> Frames:
    """Clean latents as a video of options.output_type. Raises RuntimeError if they are not all finite."""
    if not latents.isfinite().all():
        raise RuntimeError(
            f"denoising gave values that are not finite (DiT in {pipe.dit.dtype}); no video is made"
        )
    if options.output_type == "latent":
        return latents
    with pipe.residency.using("vae"):
        return decode_frames(pipe.vae, latents, options)


def decode_frames(vae: WanVideoVAE, latents: Tensor, options: DecodingOptions) -> Frames:
    """Finite latents [1, C, F, h, w] as a video of options.output_type: "pil", "np" or "pt"."""
    if options.output_type == "pt":
        return vae.decode(latents, num_frames=options.num_frames, **_tiling(options))
    if options.tiled:
        video = vae.decode(latents, num_frames=options.num_frames, **_tiling(options))
        chunks: Iterable[Tensor] = video.split(vae.temporal_factor, dim=2)
    else:
        chunks = vae.decode_chunks(latents)
    frames = chunks_to_uint8(chunks, options.num_frames)
    return frames if options.output_type == "np" else [Image.fromarray(frame) for frame in frames]


def _tiling(options: DecodingOptions) -> dict:
    return {"tiled": options.tiled, "tile_size": options.tile_size, "tile_stride": options.tile_stride}
