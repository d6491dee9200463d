"""Blocks whose activations are computed again in the backward pass; their inputs may wait on the CPU.

Gradient checkpointing keeps one tensor a block, its input. With `offload_inputs` this one, too, leaves the
accelerator until the backward pass comes to its block; values and order of operations stay the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Kept = tuple[torch.device, Tensor]


def checkpointed(block: Callable[..., Tensor], tokens: Tensor, *state: Any, offload_inputs: bool) -> Tensor:
    """block(tokens, *state), of which only `tokens` is kept for the backward pass; on the CPU if asked for.

    Tensors inside `state` stay where they are.
    """
    if not offload_inputs:
        return _run(block, tokens, *state)
    # The outer hooks see what the checkpoint keeps, not what the block computes with.
    with saved_tensors_hooks(to_host, to_device):
        return _run(block, tokens, *state)


def _run(block: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def to_host(tensor: Tensor) -> Kept:
    """The tensor's device and its copy in CPU memory, page-locked so that the copy does not stop the queue of
    work; on a CPU the tensor itself.
    """
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def to_device(kept: Kept) -> Tensor:
    """The inverse of `to_host`."""
    device, host = kept
    return host.to(device, non_blocking=True)
