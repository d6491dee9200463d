"""Distil Wan2.1-T2V-nano into a LoRA that makes a video in eight steps without a negative prompt.

python examples/train_nano/distil_steps.py --run results/train_nano --output results/few_steps.safetensors
Needs vae.state and dit.state of the trainings. One step of the student covers three of the teacher's, which
are computed with classifier-free guidance; the student learns the straight way to where they lead.
"""

import argparse
import copy
import logging
from pathlib import Path

import numpy as np
import torch
from captions import numbers_of
from latents import encoded_clips
from package import USUAL
from runs import DIT_TRAINING, Log, half_precision, load_state, rate_at
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train_dit import TextToVideo, float32_attention
from train_vae import SIZE as VAE_SIZE

from diffsynth.models.attention import BACKENDS, AttentionBackend, use_attention
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.schedulers import FlowMatchScheduler
from diffsynth.vram_management import choose_device

STEPS, SUBSTEPS = 8, 3
RANK = 32


class LowRank(nn.Module):
    """A weight [out, in] plus up @ down, which begins as zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def with_low_rank(teacher: WanModel) -> tuple[WanModel, dict[str, LowRank]]:
    """A copy whose blocks' linear layers have a low-rank change; the changes by their layers' names."""
    student = copy.deepcopy(teacher)
    changes = {}
    for name, layer in student.named_modules():
        if name.startswith("blocks.") and isinstance(layer, nn.Linear):
            changes[name] = LowRank(layer.weight)
    for name, change in changes.items():
        parametrize.register_parametrization(student.get_submodule(name), "weight", change)
    return student, changes


def levels() -> Tensor:
    """Noise levels [STEPS * SUBSTEPS + 1] of the teacher's run; every SUBSTEPS-th is one of the student's."""
    scheduler = FlowMatchScheduler(USUAL["sigma_shift"])
    scheduler.set_timesteps(STEPS * SUBSTEPS, USUAL["denoising_strength"])
    return torch.cat([scheduler.sigmas, torch.zeros(1)])


@torch.no_grad()
def teachers_way(dit: WanModel, x: Tensor, first: Tensor, sigmas: Tensor, contexts: Tensor) -> Tensor:
    """The mean velocity of the teacher from x [B, z, F, h, w] over the substeps that begin at first [B].

    contexts [2 * B, L, D]: of the captions, then of the empty prompt.
    """
    start = x
    for i in range(SUBSTEPS):
        here, there = sigmas[first + i], sigmas[first + i + 1]
        velocity = dit(torch.cat([x, x]), 1000 * torch.cat([here, here]), contexts).float()
        positive, null = velocity.chunk(2)
        guided = null + USUAL["cfg_scale"] * (positive - null)
        x = x + (there - here)[:, None, None, None, None] * guided
    return (x - start) / (sigmas[first + SUBSTEPS] - sigmas[first])[:, None, None, None, None]


def save_lora(path: Path, changes: dict[str, LowRank]) -> None:
    """Under PEFT's names, as published few-step LoRAs have them."""
    parts = {"lora_A": "down", "lora_B": "up"}
    tensors = {
        f"diffusion_model.{name}.{key}.weight": getattr(change, part).detach().to(torch.bfloat16).cpu()
        for name, change in changes.items()
        for key, part in parts.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("results/train_nano"))
    parser.add_argument("--output", type=Path, default=Path("results/few_steps.safetensors"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    log, device = Log(args.run / "distil.jsonl"), choose_device(args.device)
    vae = WanVideoVAE(**VAE_SIZE).to(device)
    vae.load_state_dict(load_state(args.run / "vae.state")["model"])
    clips = encoded_clips(vae, args.run / "latents", DIT_TRAINING, args.clips, 17, args.workers)
    state = load_state(args.run / "dit.state")
    mean, std = state["stats"].to(device)
    model = TextToVideo()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state["average"][name])
    model.to(device).requires_grad_(False)
    student, changes = with_low_rank(model.dit)
    student.to(device)

    optimiser = torch.optim.AdamW(nn.ModuleList(changes.values()).parameters(), args.lr, weight_decay=0.0)
    sigmas = levels().to(device)
    backend = "float32" if device.type == "cpu" else "sdpa"
    BACKENDS.setdefault("float32", AttentionBackend(run=float32_attention))
    recent = []
    for step in range(args.steps):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rng = np.random.default_rng((args.seed, step))
        chosen = rng.integers(0, len(clips.captions), args.batch)
        clean = (clips.latents[chosen].to(device).float() - mean) / std
        captions = [clips.captions[i] for i in chosen] + [""] * args.batch
        ids, mask = (x.to(device) for x in numbers_of(captions, rng, 0.0))
        # The student's steps in turn, so that every batch has early and late ones.
        turn = np.arange(args.batch) + rng.integers(STEPS)
        first = SUBSTEPS * torch.from_numpy(turn % STEPS).to(device)
        level = sigmas[first][:, None, None, None, None]
        x = (1 - level) * clean + level * torch.randn_like(clean)
        with half_precision(device), use_attention(backend):
            contexts = model.text(ids, mask) * mask[..., None]
            wanted = teachers_way(model.dit, x, first, sigmas, contexts)
            velocity = student(x, 1000 * sigmas[first], contexts[: args.batch])
            loss = (velocity.float() - wanted).square().mean()
        loss.backward()
        optimiser.param_groups[0]["lr"] = args.lr * rate_at(step, args.steps, warm_up=20, falling=0.5)
        optimiser.step()
        optimiser.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            log.write(step=step + 1, loss=float(np.mean(recent)))
            recent = []
            save_lora(args.output, changes)


if __name__ == "__main__":
    main()
