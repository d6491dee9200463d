"""Latents to frames."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import chunks_to_uint8, finite
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.components import Components

Frames = list[Image.Image] | np.ndarray | Tensor


def decode_latents(models: Components, latents: Tensor, options: RunOptions) -> Frames:
    """Decode clean latents [1, C, F, h, w] to a video of options.output_type."""
    finite(latents, f"denoising (DiT in {models.dit.dtype})")
    if options.output_type == "latent":
        return latents
    with models.residency.using("vae"):
        return decode_frames(models.vae, latents, options)


def decode_frames(vae: WanVideoVAE, latents: Tensor, options: RunOptions) -> Frames:
    """Decode finite latents [1, C, F, h, w] to a video of options.output_type: "pil", "np" or "pt"."""
    decoder = f"the VAE's decoder (in {vae.dtype})"
    if options.output_type == "pt":
        return finite(vae.decode(latents, num_frames=options.num_frames, **options.tiling), decoder)
    if options.tiled:
        video = vae.decode(latents, num_frames=options.num_frames, **options.tiling)
        chunks: Iterable[Tensor] = video.split(vae.temporal_factor, dim=2)
    else:
        chunks = vae.decode_chunks(latents)
    means: list[Tensor] = []  # checked together, as a device waits for each check

    def noted() -> Iterator[Tensor]:
        for chunk in chunks:
            means.append(chunk.mean())
            yield chunk

    frames = chunks_to_uint8(noted(), options.num_frames)
    finite(torch.stack(means), decoder)
    return frames if options.output_type == "np" else [Image.fromarray(frame) for frame in frames]
