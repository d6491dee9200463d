"""Helpers of both trainings: device, clips in a cache, checkpoints that a killed run continues from."""

import json
import logging
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sprite_scenes import SpriteScenes, make_sprite_clip
from tqdm import tqdm

logger = logging.getLogger(__name__)

# First number of the seeds: clips of one kind are never those of another.
VAE_TRAINING, VAE_HELD_OUT, DIT_TRAINING = 1, 2, 3


def make_clips(
    kind: int, first: int, count: int, options: SpriteScenes, workers: int, num_frames: int = 17
) -> tuple[np.ndarray, list[str]]:
    """Clips of the seeds (kind, first) ... and their captions: uint8 [count, T, H, W, 3]."""
    seeds = [(kind, first + i) for i in range(count)]
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(
            partial(_frames_and_caption, options=options, num_frames=num_frames), seeds, chunksize=16
        )
        pairs = list(tqdm(made, total=count, desc="clips", mininterval=10))
    return np.stack([frames for frames, _ in pairs]), [caption for _, caption in pairs]


def _frames_and_caption(
    seed: tuple[int, int], options: SpriteScenes, num_frames: int
) -> tuple[np.ndarray, str]:
    clip = make_sprite_clip(seed, scenes=options, num_frames=num_frames)
    return clip.frames, clip.caption


def to_model(frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def half_precision(device: torch.device) -> torch.autocast:
    """A context that computes in bfloat16; on a CPU that would emulate it, many times slower, in float32."""
    native = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def save_state(path: Path, state: dict) -> None:
    """Written beside its place and moved there, so that a kill leaves the old one."""
    temporary = path.with_suffix(".writing")
    torch.save(state, temporary)
    temporary.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """Return the state that `save_state` wrote; empty if there is no such file."""
    return torch.load(path, weights_only=True) if path.exists() else {}


class Log:
    """A JSON line for each report, in the run's folder and in the log."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, time.perf_counter()

    def write(self, **values: float) -> None:
        line = {"seconds": round(time.perf_counter() - self.started, 1), **values}
        logger.info("%s", line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def rate_at(step: int, total: int, warm_up: int, falling: float) -> float:
    """Factor on the learning rate: up over `warm_up` steps, 1, then down over the last `falling` share."""
    down = (total - step) / max(1, falling * total)
    return min(1.0, (step + 1) / warm_up, 0.5 - 0.5 * math.cos(math.pi * min(1.0, down)))
