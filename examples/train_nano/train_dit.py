"""Train the DiT and the text encoder of Wan2.2-TI2V-nano, together, by flow matching on cached latents.

python examples/train_nano/train_dit.py --run results/train_nano --start models/Wan2.1-T2V-nano
Needs vae.state of train_vae.py in the run's folder. First single frames, then clips among frames. In half of
the batches of clips the first latent frame is given clean, with timestep 0, as a picture is. Continues from
dit.state if it is there; more --video_steps than before train on from there.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import TEXT_LEN, VOCAB, numbers_of
from latents import Latents, encoded_clips
from optimisers import make_optimisers, set_rate, update_average
from runs import DIT_TRAINING, Log, half_precision, load_state, rate_at, save_state
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_vae import SIZE as VAE_SIZE

from diffsynth.models.attention import BACKENDS, AttentionBackend, use_attention
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.vram_management import choose_device

TEXT: dict[str, Any] = {
    "dim": 64,
    "dim_attn": 64,
    "dim_ffn": 128,
    "num_heads": 4,
    "num_layers": 2,
    "num_buckets": 32,
}
DIT: dict[str, Any] = {"dim": 160, "ffn_dim": 640, "freq_dim": 64, "num_heads": 5, "num_layers": 6}
IMAGE_KIND = 100 + DIT_TRAINING
SHIFT = 3.0  # of the noise levels, as in generation
CAPTION_DROP = 0.1
PICTURE_CAPTION_DROP = 0.3  # where a picture is given, which says more than a caption
IMAGES_AMONG_CLIPS = 8  # of the second stage, batches of frames, which teach shapes fastest
# Batches of the other clips are cut, in turn, to so many latent frames: short ones teach moving shapes at a
# fraction of the cost. The VAE is causal, so the first latents of a clip are those of its first frames.
LONGEST = 5
CLIP_FRAMES = (2, LONGEST, 2, 3)
# Where a clip moves, which is a tenth of it, errors count so much more: below the noise level at which its
# place is known, so that what is learned stays the mean that flow matching asks for.
MOVING_WEIGHT, MOVING_BELOW, MOVING = 4.0, 0.7, 0.3
AVERAGE = 0.998
VALIDATION_CLIPS = 64  # the last ones, never trained on


class TextToVideo(nn.Module):
    """Both models, trained as one: caption numbers and noised latents to velocity."""

    def __init__(self) -> None:
        super().__init__()
        z = VAE_SIZE["z_dim"]
        self.text = WanTextEncoder(vocab=VOCAB, **TEXT)
        self.dit = WanModel(in_dim=z, out_dim=z, text_dim=TEXT["dim"], text_len=TEXT_LEN, **DIT)
        self._initialise()

    def _initialise(self) -> None:
        """Each block starts as the identity and the velocity as zero."""
        for module in self.dit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.dit.blocks:
            block: Any = module
            for last in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                nn.init.zeros_(last.weight)
        nn.init.zeros_(self.dit.head.head.weight)

    def forward(self, x: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        context = self.text(ids, mask) * mask[..., None]
        return self.dit(x, timestep, context)


def float32_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, N, D] all; on a CPU the backward pass is twice as fast in float32 as in bfloat16."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains it: the matrices inside the DiT's blocks."""
    return ".blocks." in name and name.startswith("dit.") and parameter.ndim == 2


def load_start(model: TextToVideo, folder: Path) -> None:
    """Load the weights of a checkpoint folder; words that it does not have keep their random embeddings."""
    model.dit.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    weights = load_file(folder / "models_t5_umt5-enc-bf16.safetensors")
    rows = weights["token_embedding.weight"].float()
    words = 0.5 * rows.std() * torch.randn(VOCAB, rows.shape[1]) + rows.mean(0)
    words[: len(rows)] = rows
    weights["token_embedding.weight"] = words
    model.text.load_state_dict(weights)


def batch_loss(
    model: TextToVideo,
    data: Latents,
    chosen: np.ndarray,
    frames: int,
    rng: np.random.Generator,
    stats: Tensor,
    picture: bool = False,
    weighted: bool = False,
) -> Tensor:
    """Return the flow-matching loss, v = noise - clean, of the chosen clips, cut to `frames` latent frames.

    Noise levels are spread evenly over the batch. If `picture`, the first frame is clean and not in the loss.
    If `weighted`, errors where the clip moves count more.
    """
    count = len(chosen)
    mean, std = stats
    clean = (data.latents[chosen][:, :, :frames].to(mean.device).float() - mean) / std
    drop = PICTURE_CAPTION_DROP if picture else CAPTION_DROP
    ids, mask = numbers_of([data.captions[i] for i in chosen], rng, drop)
    u = torch.from_numpy((rng.permutation(count) + rng.random(count)) / count).to(clean)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    if picture:
        sigma = sigma[:, None].repeat(1, frames)
        sigma[:, 0] = 0
    noise = torch.randn_like(clean)
    level = sigma.reshape(count, 1, -1, 1, 1)
    velocity = model(
        (1 - level) * clean + level * noise, 1000 * sigma, ids.to(clean.device), mask.to(clean.device)
    )
    errors = (velocity.float() - (noise - clean)).square()
    if weighted and frames > 1:
        still = clean[:, :, 1:].median(2, keepdim=True).values
        moves = ((clean - still).abs().mean(1, keepdim=True) > MOVING) & (level < MOVING_BELOW)
        weight = 1 + (MOVING_WEIGHT - 1) * moves
        errors = errors * weight / weight[:, :, int(picture) :].mean()
    return errors[:, :, int(picture) :].mean()


@torch.no_grad()
def validation_losses(
    model: TextToVideo,
    weights: dict[str, nn.Parameter],
    average: dict[str, Tensor],
    clips: Latents,
    stats: Tensor,
) -> dict[str, float]:
    """Return the losses of the averaged weights on the last clips, without and with a picture."""
    count = len(clips.captions)
    chosen = np.arange(max(0, count - VALIDATION_CLIPS), count)
    current = {name: value.detach().clone() for name, value in weights.items()}
    losses = {}
    for name, value in weights.items():
        value.copy_(average[name])
    for name, picture in (("validation_text", False), ("validation_picture", True)):
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        losses[name] = batch_loss(model, clips, chosen, LONGEST, rng, stats, picture).item()
    for name, value in weights.items():
        value.copy_(current[name])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("results/train_nano"))
    parser.add_argument("--start", type=Path, help="checkpoint folder whose weights training starts from")
    parser.add_argument("--images", type=int, default=16000)
    parser.add_argument("--clips", type=int, default=6000)
    parser.add_argument("--image_steps", type=int, default=1700)
    parser.add_argument("--video_steps", type=int, default=20300)
    parser.add_argument("--whole_clip_steps", type=int, default=4000, help="last steps, with uncut clips")
    parser.add_argument("--image_batch", type=int, default=64)
    parser.add_argument("--video_batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate of Muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile the DiT's blocks")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    log, device = Log(args.run / "dit.jsonl"), choose_device(args.device)
    vae = WanVideoVAE(**VAE_SIZE).to(device)
    vae.load_state_dict(load_state(args.run / "vae.state")["model"])
    folder = args.run / "latents"
    images = encoded_clips(vae, folder, IMAGE_KIND, args.images, 1, args.workers)
    clips = encoded_clips(vae, folder, DIT_TRAINING, args.clips, 17, args.workers)
    whole = clips.latents.float()
    stats = torch.stack([whole.mean((0, 2, 3, 4)), whole.std((0, 2, 3, 4))])[..., None, None, None].to(device)
    del whole, vae

    torch.manual_seed(args.seed)
    model = TextToVideo()
    if args.start is not None:
        load_start(model, args.start)
    model.to(device)
    # By the names of parameters: the text encoder's own state dict has its official names.
    weights = dict(model.named_parameters())
    average = {name: value.detach().clone() for name, value in weights.items()}
    optimisers = make_optimisers(
        model, is_matrix, muon_lr=args.rate, adam_lr=args.rate / 2, weight_decay=0.05
    )
    first = 0
    if state := load_state(args.run / "dit.state"):
        with torch.no_grad():
            for name, value in state["model"].items():
                weights[name].copy_(value)
        average = {name: value.to(device) for name, value in state["average"].items()}
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        first = state["step"]
    if args.compile:
        for block in model.dit.blocks:
            block.compile()
    if device.type == "cpu":
        BACKENDS["float32"] = AttentionBackend(run=float32_attention)
    total = args.image_steps + args.video_steps
    spare = len(clips.captions) // 2
    recent = []
    for step in range(first, total):
        torch.manual_seed(args.seed * 1_000_003 + step)
        rng = np.random.default_rng((args.seed, step))
        frames_only = step < args.image_steps or step % IMAGES_AMONG_CLIPS == 0
        uncut = step >= total - args.whole_clip_steps
        frames = 1 if frames_only else LONGEST if uncut else CLIP_FRAMES[step % len(CLIP_FRAMES)]
        data, count = images if frames_only else clips, args.video_batch * LONGEST // frames
        if frames_only:
            count = args.image_batch
        set_rate(optimisers, rate_at(step, total, warm_up=50, falling=0.4))
        attention = use_attention("float32" if device.type == "cpu" else "sdpa")
        with half_precision(device), attention:
            trained_on = len(data.captions) - (0 if frames_only else min(VALIDATION_CLIPS, spare))
            chosen = rng.integers(0, trained_on, count)
            picture = frames > 1 and bool(rng.random() < 0.5)
            loss = batch_loss(model, data, chosen, frames, rng, stats, picture, weighted=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        update_average(average, weights, min(AVERAGE, (step + 1) / (step + 10)))
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            log.write(step=step + 1, loss=float(np.mean(recent)))
            recent = []
        if (step + 1) % 500 == 0 or step + 1 == total:
            log.write(step=step + 1, **validation_losses(model, weights, average, clips, stats))
        if (step + 1) % 250 == 0 or step + 1 == total:
            saved = [optimiser.state_dict() for optimiser in optimisers]
            save_state(
                args.run / "dit.state",
                {
                    "model": {name: value.detach() for name, value in weights.items()},
                    "average": average,
                    "optimisers": saved,
                    "step": step + 1,
                    "stats": stats.cpu(),
                },
            )


if __name__ == "__main__":
    main()
