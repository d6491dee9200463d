"""Cheap previews of latents: a linear map from their channels to colours, fitted to the VAE."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, interpolate

from diffsynth.pipelines.denoise import RunEvent
from diffsynth.pipelines.wan_video import WanVideoPipeline

# Seeds, frames and side of the clips that the map is fitted to: clouds of colour that change slowly.
_SEEDS, _FRAMES, _SIDE = (1, 2, 3, 4), 9, 128
_CLOUDS = (3, 6, 6)  # frames, rows and columns of random colours, with colours between them
SHOWN_SIDE = 192  # pixels, of the shorter side
MOST_SHOWN = 12  # frames
PREVIEWS_OF_A_RUN = 10
_MILLISECONDS = 250  # a latent frame stands for four of the video


class Previews:
    """Previews of the runs of a pipeline; the constructor encodes a few clips to fit the map to colours."""

    def __init__(self, pipe: WanVideoPipeline) -> None:
        self._colours = fit_colours(pipe)

    def of(self, event: RunEvent) -> bytes | None:
        """Return an animated WebP of an event's clean latents; None for steps without a preview."""
        every = max(1, event.steps // PREVIEWS_OF_A_RUN)
        if event.clean is None or event.step % every:
            return None
        frames = latent_frames(event.clean, self._colours)
        step = -(-len(frames) // MOST_SHOWN)
        first, *others = (ImageOps.cover(frame, (SHOWN_SIDE, SHOWN_SIDE)) for frame in frames[::step])
        file = io.BytesIO()
        times = {"duration": _MILLISECONDS * step, "loop": 0}
        first.save(file, "WEBP", save_all=True, append_images=others, quality=70, **times)
        return file.getvalue()


@torch.no_grad()
def fit_colours(pipe: WanVideoPipeline) -> Tensor:
    """Return the map [C + 1, 3] of a VAE's channels to colours in [-1, 1]; the last row is the constant."""
    rows, colours = [], []
    for seed in _SEEDS:
        clouds = torch.rand(1, 3, *_CLOUDS, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        video = interpolate(clouds, (_FRAMES, _SIDE, _SIDE), mode="trilinear")
        with pipe.residency.using("vae"):
            latents = pipe.vae.encode(video, tiled=True).float().cpu()
        # The first frame is one latent frame, and looks like those that follow it.
        length, height, width = latents.shape[2:]
        seen = adaptive_avg_pool3d(video.float().cpu(), (length, height, width))
        rows.append(latents[0].flatten(1).T)
        colours.append(seen[0].flatten(1).T)
    known = torch.cat(rows).double()
    known = torch.cat([known, torch.ones(len(known), 1, dtype=known.dtype)], dim=1)
    return torch.linalg.lstsq(known, torch.cat(colours).double()).solution.float()


def latent_frames(latents: Tensor, colours: Tensor) -> list[Image.Image]:
    """Return F pictures of w x h pixels of latents [1, C, F, h, w], by a map from `fit_colours`."""
    channels = latents[0].detach().float().cpu()
    pixels = torch.einsum("cfhw,cd->fhwd", channels, colours[:-1]) + colours[-1]
    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).nan_to_num().round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(frame)) for frame in bytes_.numpy()]
