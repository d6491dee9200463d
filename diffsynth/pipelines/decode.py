"""Latents to frames: at the end of a run, or later from a file of final latents."""

import logging
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import chunks_to_uint8, finite
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.components import Components
from diffsynth.planning.ladder import Ladder
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.latents import read_latents

logger = logging.getLogger(__name__)

Frames = list[Image.Image] | np.ndarray | Tensor


def decode_latents(models: Components, latents: Tensor, options: RunOptions) -> Frames:
    """Decode clean latents [1, C, F, h, w] to a video of options.output_type.

    Raises:
        RuntimeError: a latent is not finite.
    """
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


@torch.no_grad()
def decode_saved(
    path: str | Path,
    vae_or_pipe: Any,
    tiled: bool = True,
    *,
    tile_size: tuple[int, int] = (30, 52),
    tile_stride: tuple[int, int] = (15, 26),
    output_type: str = "pil",
) -> Frames:
    """Decode final latents that a run saved in its checkpoint_dir. If memory runs out, tiles get smaller.

    A warning is logged if the VAE has other weights or another dtype than that of the run.

    Args:
        path: a file of final latents.
        vae_or_pipe: a `WanVideoVAE`, or a pipeline whose VAE is used.
        tiled: decode in spatial tiles of tile_size and tile_stride, (rows, columns) in latent units.
        tile_size, tile_stride: (rows, columns) in latent units.
        output_type: "pil", "np" or "pt", as in the pipeline's call.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another kind, or the VAE has other sizes.
    """
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be one of pil, np, pt; got {output_type!r}")
    latents, facts = read_latents(path)
    models = None if isinstance(vae_or_pipe, WanVideoVAE) else vae_or_pipe.models
    vae = vae_or_pipe if models is None else models.vae
    pixels = tuple(n * vae.spatial_factor for n in latents.shape[3:])
    if latents.shape[1] != vae.z_dim or pixels != (facts["height"], facts["width"]):
        raise ValueError(
            f"{path} holds latents {tuple(latents.shape)} of {facts['height']} x {facts['width']} pixels; "
            f"the VAE has {vae.z_dim} channels and {vae.spatial_factor} pixels a latent"
        )
    if weights_fingerprint(vae) != facts["vae"]:
        logger.warning("%s was made with a VAE of other weights or another type", path)
    options = RunOptions(
        **{name: facts[name] for name in ("height", "width", "num_frames")},
        output_type=output_type,
        tiled=tiled,
        tile_size=tile_size,
        tile_stride=tile_stride,
    )
    ladder = Ladder(None if models is None else models.residency, vae)
    decode = partial(decode_frames, vae) if models is None else partial(decode_latents, models)
    return ladder.run("decode", partial(decode, latents), options)[0]
