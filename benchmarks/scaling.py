"""How the guidance pass grows with the video: operations of a gradient at 1, 2, 4 and 8 times the tokens."""

import torch
from contenders import SIGMA, SIZES
from measure import count_flops
from torch import Tensor

from diffsynth.models.wan_video_dit import WanModel

WINDOW = (2, 6, 6)
BLOCK = 14


def scaling_rows(size: str, latent_side: tuple[int, int]) -> list[dict[str, float]]:
    """Rows of TFLOP for q and k of one block and their gradient, attention dense and within WINDOW.

    Counted on tensors without data, so at real sizes on any machine; videos grow in frames.
    """
    with torch.device("meta"):
        dit = WanModel(**SIZES[size]).requires_grad_(False)
    rows = []
    for frames in (5, 10, 20, 40):
        dense, local = (gradient_flops(dit, (frames, *latent_side), window) for window in (None, WINDOW))
        tokens = frames * latent_side[0] * latent_side[1] // 4
        rows.append(
            {
                "latent frames": frames,
                "tokens": tokens,
                "dense TFLOP": dense / 1e12,
                "windowed TFLOP": local / 1e12,
                "dense, a token": dense / tokens / 1e9,
                "windowed, a token": local / tokens / 1e9,
            }
        )
    return rows


def gradient_flops(dit: WanModel, shape: tuple[int, int, int], window: tuple[int, int, int] | None) -> int:
    """Operations of a gradient of block BLOCK's q and k on the latents."""
    x = torch.empty(1, dit.in_dim, *shape, device="meta", requires_grad=True)
    context = torch.empty(1, 512, dit.text_dim, device="meta")
    timestep = torch.empty(1, device="meta").fill_(1000 * SIGMA)

    def gradient() -> Tensor:
        q, k = dit.features(x, timestep, context, block=BLOCK, attention_window=window)
        (result,) = torch.autograd.grad((q + k).sum(), x)
        return result

    return count_flops(gradient)
