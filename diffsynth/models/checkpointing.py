"""Blocks whose activations are computed again in the backward pass; their inputs may wait on the CPU.

Gradient checkpointing keeps one tensor a block, its input. With `offload_inputs` this one, too, leaves the
accelerator until the backward pass comes to its block; values and order of operations stay the same.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Kept = tuple[torch.device, Tensor]


def checkpointed(block: Callable[..., Tensor], tokens: Tensor, *state: Any, offload_inputs: bool) -> Tensor:
    """Run block(tokens, *state) and keep only `tokens` for the backward pass, on the CPU if asked for.

    Tensors inside `state` stay where they are.
    """
    # The outer hooks see what the checkpoint keeps, not what the block computes with.
    with saved_tensors_hooks(to_host, to_device) if offload_inputs else nullcontext():
        return checkpoint(block, tokens, *state, use_reentrant=False, preserve_rng_state=False)


def to_host(tensor: Tensor) -> Kept:
    """Return the tensor's device and its copy in CPU memory; on a CPU the tensor itself.

    Page-locked, so that the copy does not stop the queue of work as `torch.autograd.graph.save_on_cpu` does.
    """
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def to_device(kept: Kept) -> Tensor:
    """Return a tensor that `to_host` has moved, on its device again."""
    device, host = kept
    return host.to(device, non_blocking=True)
