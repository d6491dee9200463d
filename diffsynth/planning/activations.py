"""How much memory passes through the DiT's blocks take, and how much the guidance pass may keep.

Counted on the model, in bytes a token and unit of width: w is the size of the weights' dtype, the residual
stream and what is normed is float32. Checked against `testing_memory` at the sizes of the published models.
"""

from typing import Protocol

import torch

from diffsynth.models.wan_video_dit_layers import SLICE_TOKENS
from diffsynth.vram_management.memory import available_memory

# Share of the memory at hand that activations may fill; the rest is for what a block computes with.
FILL = 0.6
STREAM = 4  # bytes of a number of the residual stream


class DiTDims(Protocol):
    """The sizes of a DiT that its memory depends on; `WanModel` has them."""

    dim: int
    ffn_dim: int
    num_heads: int
    text_len: int

    @property
    def dtype(self) -> torch.dtype:
        """What linear layers and attention compute in."""


def activation_bytes(dit: DiTDims, num_tokens: int, num_blocks: int) -> int:
    """Bytes that `num_blocks` blocks keep for the gradient of their input, weights taking none.

    A block keeps the inputs of its six norms in float32, six tensors of the width (queries, keys, values and
    output of the self-attention, queries and output of the cross-attention) and the feed-forward's hidden
    layer in the dtype of the weights, statistics of norms and attentions, and the text's keys and values.
    """
    w = dit.dtype.itemsize
    a_token = dit.dim * (24 + 6 * w) + dit.ffn_dim * w + 4 * (9 + 2 * dit.num_heads)
    return num_blocks * (num_tokens * a_token + dit.text_len * dit.dim * 2 * w)


def block_gradient_bytes(dit: DiTDims, num_tokens: int) -> int:
    """Bytes of one block that is computed again and differentiated, its input and incoming gradient included.

    The larger of two moments: the end of the second forward, which holds the hidden layer before and after
    its activation and three tensors of the width beside what it keeps; and the activation's gradient, when
    there are three hidden layers.
    """
    w = dit.dtype.itemsize
    kept = activation_bytes(dit, num_tokens, 1)
    gradient = STREAM * dit.dim
    forward_end = gradient + 3 * w * dit.dim + dit.ffn_dim * w
    activation = gradient + 2 * dit.ffn_dim * w
    return kept + num_tokens * max(forward_end, activation)


def forward_bytes(dit: DiTDims, num_tokens: int, batch: int = 1) -> int:
    """Bytes at most alive in a pass without gradients through the blocks.

    The larger of two moments: the norm of the cross-attention's queries, with three states of the stream and
    the text's keys and values; and the feed-forward's last slice.
    """
    w = dit.dtype.itemsize
    text = dit.text_len * dit.dim * w
    attention = num_tokens * dit.dim * (5 * STREAM + 3 * w) + 3 * text
    hidden = min(num_tokens, SLICE_TOKENS) * dit.ffn_dim * 2 * w
    feed_forward = num_tokens * dit.dim * (3 * STREAM + 3 * w) + hidden + text
    return batch * max(attention, feed_forward)


def should_checkpoint(dit: DiTDims, num_tokens: int, num_blocks: int, device: torch.device) -> bool:
    """Whether blocks should keep their input only and compute the rest again in the backward pass."""
    return activation_bytes(dit, num_tokens, num_blocks) > FILL * available_memory(device)


def choose_checkpoint(dit: DiTDims, num_tokens: int, num_blocks: int, device: torch.device) -> str:
    """What the guidance pass keeps by the memory there is: "none" (all), "block" (each block's input) or,
    where even the inputs are too much for an accelerator, "offload" (these on the CPU).
    """
    if not should_checkpoint(dit, num_tokens, num_blocks, device):
        return "none"
    inputs = num_blocks * num_tokens * dit.dim * STREAM
    fits = inputs + block_gradient_bytes(dit, num_tokens) <= available_memory(device)
    return "block" if fits or device.type == "cpu" else "offload"
