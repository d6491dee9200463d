"""Final latents that a run left in a file, to frames."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffsynth.configs.options import RunOptions
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.decode import Frames, decode_frames, decode_latents
from diffsynth.planning.ladder import Ladder
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.latents import read_latents

logger = logging.getLogger(__name__)


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
