"""Train the video VAE of Wan2.2-TI2V-nano on generated clips.

python examples/train_nano/train_vae.py --run results/train_nano --start models/Wan2.1-T2V-nano
Continues from results/train_nano/vae.state if it is there. --start: weights to begin with.
--decoder_steps: further steps on whole clips that
leave the encoder, and so the latents that a DiT was trained on, as they are.
"""

import argparse
import logging
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from optimisers import make_optimisers, set_rate
from runs import (
    VAE_HELD_OUT,
    VAE_TRAINING,
    Log,
    half_precision,
    load_state,
    make_clips,
    rate_at,
    save_state,
    to_model,
)
from safetensors.torch import load_file
from sprite_package import HELD_OUT_SPRITES
from sprite_scenes import SpriteScenes
from synthetic import SceneOptions
from torch import Tensor, nn

from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.models.wan_video_vae_layers import Downsample, ResidualBlock, Upsample
from diffsynth.vram_management import choose_device

SIZE: dict[str, Any] = {
    "dim": 16,
    "z_dim": 8,
    "dim_mult": (1, 2, 4),
    "num_res_blocks": 1,
    "temperal_downsample": (True, True),
}
MOTION = SceneOptions(textured=0.2, shaded=0.2, checkered=0.15, second_object=0.3, camera=0.3)
SCENES = SpriteScenes(motion=MOTION)
UNSEEN = SpriteScenes(motion=MOTION, sprites=HELD_OUT_SPRITES, shapes_only=0.0)
# From easy to hard: share of the steps, clips in a batch, frames, pixels a side.
STAGES = ((0.32, 16, 1, 64), (0.2, 6, 5, 64), (0.28, 8, 17, 32), (0.2, 3, 17, 64))
# A VAE that codes motion already needs fewer single frames.
STAGES_FROM_START = ((0.25, 16, 1, 64), (0.15, 6, 5, 64), (0.4, 8, 17, 32), (0.2, 3, 17, 64))
Stages = tuple[tuple[float, int, int, int], ...]
KL_WEIGHT = 5e-4


def start_near_identity(vae: WanVideoVAE) -> None:
    """Residual blocks add nothing, no layer looks at the past, frames pass through time unchanged."""
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3 and module.kernel_size[1] == 3:
                module.weight[:, :, -1] *= 3**0.5
                module.weight[:, :, :-1] = 0
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(cast(nn.Conv3d, module.residual["6"]).weight)
                nn.init.zeros_(cast(Tensor, cast(nn.Conv3d, module.residual["6"]).bias))
            if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                conv = module.time_conv
                nn.init.zeros_(conv.weight)
                nn.init.zeros_(cast(Tensor, conv.bias))
                eye = torch.eye(conv.in_channels).repeat(conv.out_channels // conv.in_channels, 1)
                conv.weight[:, :, 1 if isinstance(module, Downsample) else 2, 0, 0] = eye


def decode(vae: WanVideoVAE, latents: Tensor) -> Tensor:
    """As `vae.decode`, but not clamped, so that every pixel has a gradient."""
    cache: dict = {}
    return torch.cat([vae.decoder(vae.conv2(frame), cache) for frame in latents.split(1, dim=2)], dim=2)


def loss_of(vae: WanVideoVAE, video: Tensor) -> tuple[Tensor, dict[str, float]]:
    mean, log_variance = vae.encode_moments(video)
    log_variance = log_variance.clamp(-20, 5)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    difference = decode(vae, latents).float() - video
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    squares = difference.square().mean()
    loss = difference.abs().mean() + 2 * squares + KL_WEIGHT * kl
    return loss, {"mse": squares.item(), "kl": kl.item()}


def freeze_encoder(vae: WanVideoVAE) -> None:
    vae.encoder.requires_grad_(False)
    vae.conv1.requires_grad_(False)


def batch_for(step: int, total: int, clips: np.ndarray, seed: int, stages: Stages = STAGES) -> Tensor:
    """The clips of a step: cut in time and space to the size of its stage, turned at random."""
    rng = np.random.default_rng((seed, step))
    ends = np.cumsum([share for share, *_ in stages])
    _, count, frames, side = stages[min(int(np.searchsorted(ends, (step + 1) / total)), len(stages) - 1)]
    start = rng.integers(0, clips.shape[1] - frames + 1)
    row, col = rng.integers(0, clips.shape[2] - side + 1, 2)
    area = clips[rng.integers(0, len(clips), count)]
    area = area[:, start : start + frames, row : row + side, col : col + side]
    return to_model(np.rot90(area, int(rng.integers(4)), axes=(2, 3)))


@torch.no_grad()
def held_out_errors(vae: WanVideoVAE, count: int, scenes: SpriteScenes = SCENES) -> Tensor:
    """Mean squared error [count] of each whole held-out clip, over pixels from 0 to 1."""
    frames, _ = make_clips(VAE_HELD_OUT, 0, count, scenes, workers=1)
    video = to_model(frames).to(vae.device)
    again = torch.cat([vae.decode(vae.encode(clip)) for clip in video.split(4)])
    return ((again - video) / 2).square().mean((1, 2, 3, 4))


def psnr(errors: Tensor) -> Tensor:
    """Decibels of mean squared errors over pixels from 0 to 1."""
    return -10 * errors.log10()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("results/train_nano"))
    parser.add_argument("--start", type=Path, help="checkpoint folder whose VAE training starts from")
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--decoder_steps", type=int, default=0)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--held_out", type=int, default=16, help="clips that PSNR is measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.run.mkdir(parents=True, exist_ok=True)
    log, device = Log(args.run / "vae.jsonl"), choose_device(args.device)
    clips, _ = make_clips(VAE_TRAINING, 0, args.clips, SCENES, args.workers)
    torch.manual_seed(args.seed)
    vae = WanVideoVAE(**SIZE)
    if args.start is None:
        start_near_identity(vae)
    else:
        vae.load_state_dict(load_file(args.start / "Wan2.1_VAE.safetensors"))
    stages = STAGES if args.start is None else STAGES_FROM_START
    vae.to(device)
    optimisers = make_optimisers(
        vae, lambda _, p: p.ndim >= 4, muon_lr=1.2e-3, adam_lr=1e-3, weight_decay=0.0
    )
    first = 0
    if state := load_state(args.run / "vae.state"):
        vae.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
    total = args.steps + args.decoder_steps
    for step in range(first, total):
        torch.manual_seed(args.seed * 1_000_003 + step)
        video = batch_for(step, args.steps, clips, args.seed, stages).to(device)
        if step < args.steps:
            rate = rate_at(step, args.steps, warm_up=30, falling=0.6)
        else:
            freeze_encoder(vae)
            rate = 0.5 * rate_at(step - args.steps, args.decoder_steps, warm_up=30, falling=0.8)
        set_rate(optimisers, rate)
        with half_precision(device):
            loss, parts = loss_of(vae, video)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if (step + 1) % 10 == 0:
            log.write(step=step + 1, loss=loss.item(), **parts)
        if (step + 1) % 200 == 0 or step + 1 in (args.steps, total):
            errors = held_out_errors(vae, args.held_out), held_out_errors(vae, args.held_out, UNSEEN)
            seen, unseen = (psnr(error.mean()).item() for error in errors)
            log.write(step=step + 1, psnr=seen, psnr_unseen_sprites=unseen)
            saved = [optimiser.state_dict() for optimiser in optimisers]
            save_state(
                args.run / "vae.state", {"model": vae.state_dict(), "optimisers": saved, "step": step + 1}
            )


if __name__ == "__main__":
    main()
