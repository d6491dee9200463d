"""Blocks whose activations are computed again in the backward pass, in three ways.

Gradient checkpointing keeps one tensor a block, its input ("block"). This one, too, may leave the
accelerator until the backward pass comes to its block ("offload"). Or the result of self-attention, most of
what would be computed again, is kept beside it in half as much memory ("attention"). Values are the same.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Kept = tuple[torch.device, Tensor]


def checkpointed(block: Callable[..., Tensor], tokens: Tensor, *state: Any, keep: str) -> Tensor:
    """Run block(tokens, *state); for the backward pass keep `tokens` and what `keep` says (see above).

    Tensors inside `state` stay where they are.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep == "attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _self_attention)
    # The outer hooks see what the checkpoint keeps, not what the block computes with.
    with saved_tensors_hooks(to_host, to_device) if keep == "offload" else nullcontext():
        return checkpoint(block, tokens, *state, **options)


def _self_attention(_context: Any, operation: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
    """Keep what a kernel of attention returns if queries and keys are as many: not that over a text."""
    found = any(name in str(operation) for name in ("attention", "flash_attn"))
    kept = found and inputs[0].shape == inputs[1].shape
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


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
