"""Captioned latents for the training of the DiT, encoded once and kept in files."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from runs import half_precision, make_clips, to_model
from safetensors.torch import load_file, save_file
from sprite_scenes import SpriteScenes
from torch import Tensor

from diffsynth.models.wan_video_vae import WanVideoVAE

logger = logging.getLogger(__name__)

SCENES = SpriteScenes()
CHUNK = 1000  # clips in a file


@dataclass(frozen=True, slots=True)
class Latents:
    """latents float16 [N, z, F, h, w], not normalised; captions, N of them."""

    latents: Tensor
    captions: list[str]


@torch.no_grad()
def encoded_clips(
    vae: WanVideoVAE, folder: Path, kind: int, count: int, num_frames: int, workers: int
) -> Latents:
    """`count` clips of `num_frames` frames; chunks that are in the folder are not encoded again."""
    folder.mkdir(parents=True, exist_ok=True)
    latents, captions = [], []
    for first in range(0, count, CHUNK):
        path = folder / f"{num_frames:02d}frames-{first:06d}.safetensors"
        if not path.exists():
            size = min(CHUNK, count - first)
            frames, words = make_clips(kind, first, size, SCENES, workers, num_frames)
            _save(path, encode(vae, frames), words)
            logger.info("%s", path)
        latents.append(load_file(path)["latents"])
        captions += json.loads(path.with_suffix(".json").read_text())
    return Latents(torch.cat(latents)[:count], captions[:count])


def _save(path: Path, latents: Tensor, captions: list[str]) -> None:
    path.with_suffix(".json").write_text(json.dumps(captions))
    save_file({"latents": latents}, path.with_suffix(".writing"))
    path.with_suffix(".writing").replace(path)


def encode(vae: WanVideoVAE, frames: np.ndarray, batch: int = 32) -> Tensor:
    """Means of the latents of uint8 frames [N, T, H, W, 3]: float16 [N, z, F, h, w]."""
    means = []
    for first in range(0, len(frames), batch):
        video = to_model(frames[first : first + batch]).to(vae.device)
        with half_precision(vae.device):
            means.append(vae.encode_moments(video)[0].half().cpu())
    return torch.cat(means)
