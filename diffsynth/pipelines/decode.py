"""Final latents in a file, and their video made later, on this machine or another one."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffsynth.configs.options import RunOptions
from diffsynth.data import VideoData
from diffsynth.data.tensors import Video
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.stages import Frames, decode_frames
from diffsynth.planning.ladder import Holder, MemoryFallbacks
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.state import load_state

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger(__name__)

KIND = "final latents"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """How latents become a video: the fields of `RunOptions` of these names."""

    height: int
    width: int
    num_frames: int
    output_type: str
    tiled: bool
    tile_size: tuple[int, int]
    tile_stride: tuple[int, int]


def latents_facts(
    pipe: "WanVideoPipeline", options: RunOptions, video: Video | None, cost: RunCost
) -> dict[str, object]:
    """What is saved beside final latents: all that decoding them needs to know, and what they cost.

    fps is the reference's, None where it does not say.
    """
    return {
        "kind": KIND,
        "num_frames": options.num_frames,
        "height": options.height,
        "width": options.width,
        "fps": video.fps if isinstance(video, VideoData) else None,
        "vae": weights_fingerprint(pipe.vae),
        "cost": cost.state(),
    }


def read_latents_facts(path: str | Path) -> dict[str, object]:
    """What a file of final latents says of its video: num_frames, height, width, fps, vae and cost.

    Raises FileNotFoundError, or ValueError for a file that is damaged or of another kind.
    """
    return _read(path)[1]


@torch.no_grad()
def decode_saved(
    path: str | Path,
    vae_or_pipe: "WanVideoVAE | WanVideoPipeline",
    tiled: bool = True,
    *,
    tile_size: tuple[int, int] = (30, 52),
    tile_stride: tuple[int, int] = (15, 26),
    output_type: str = "pil",
) -> Frames:
    """The video of final latents that a run saved in its checkpoint_dir.

    Where memory runs out, tiles get smaller, with a warning. output_type: "pil", "np" or "pt", as in the
    pipeline's call. Raises FileNotFoundError, or ValueError for a file that is damaged or of another kind and
    for a VAE that the latents do not fit; another VAE of the right sizes costs a warning.
    """
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be one of pil, np, pt; got {output_type!r}")
    latents, facts = _read(path)
    pipe = None if isinstance(vae_or_pipe, WanVideoVAE) else vae_or_pipe
    vae = vae_or_pipe if pipe is None else pipe.vae
    pixels = tuple(n * vae.spatial_factor for n in latents.shape[3:])
    if latents.shape[1] != vae.z_dim or pixels != (facts["height"], facts["width"]):
        raise ValueError(
            f"{path} holds latents {tuple(latents.shape)} of {facts['height']} x {facts['width']} pixels; "
            f"the VAE has {vae.z_dim} channels and {vae.spatial_factor} pixels a latent"
        )
    if weights_fingerprint(vae) != facts["vae"]:
        logger.warning("%s was made with a VAE of other weights or another type", path)
    options = DecodeOptions(
        **{name: facts[name] for name in ("height", "width", "num_frames")},
        output_type=output_type,
        tiled=tiled,
        tile_size=tuple(tile_size),
        tile_stride=tuple(tile_stride),
    )

    def attempt(options: DecodeOptions) -> Frames:
        if pipe is None:
            return decode_frames(vae, latents, options)
        with pipe.residency.using("vae"):
            return decode_frames(vae, latents, options)

    return MemoryFallbacks(Holder(vae=vae, pipe=pipe), options).run("decode", attempt)


def _read(path: str | Path) -> tuple[torch.Tensor, Mapping[str, object]]:
    state, facts = load_state(Path(path))
    if facts.get("kind") != KIND:
        raise ValueError(f"{path} holds no final latents, but another part of a run")
    return state["latents"], facts
