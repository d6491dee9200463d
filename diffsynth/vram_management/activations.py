"""How much memory the guidance pass keeps for its backward, and whether that fits."""

import torch

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.vram_management.memory import available_memory

# Share of the memory at hand that activations may fill; the rest is for what a block computes with.
FILL = 0.6


def activation_bytes(dit: WanModel, num_tokens: int, num_blocks: int) -> int:
    """Bytes that `num_blocks` blocks keep for the gradient of their input, weights taking none.

    Counted on the model: about 25 bytes a token and unit of width for what is float32, eight tensors of the
    width and one of the feed-forward's width in the dtype of the weights.
    """
    size = dit.dtype.itemsize
    return num_tokens * num_blocks * (dit.dim * (25 + 8 * size) + dit.ffn_dim * size)


def should_checkpoint(dit: WanModel, num_tokens: int, num_blocks: int, device: torch.device) -> bool:
    """Whether blocks should keep their input only and compute the rest again in the backward pass."""
    return activation_bytes(dit, num_tokens, num_blocks) > FILL * available_memory(device)
