"""Weights of a DiT's blocks split over all ranks by FSDP2: each keeps 1/N, for models larger than one GPU.

A block's weights are gathered before it runs, forward and backward, while the block before it computes, and
freed after it: a rank holds its shares, the block that runs and the next one. Results are those of whole
weights.
"""

import warnings
from itertools import pairwise

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from diffsynth.models.packed_linear import PackedLinear
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.vram_management.streaming import LAST_OF_PASS


def shard(dit: WanModel, device_type: str) -> FSDPModule:
    """Split the blocks of a DiT with equal weights on all ranks, for good; return FSDP's root of them.

    Raises:
        ValueError: the weights are packed in eight bits or less.
    """
    if any(isinstance(module, PackedLinear) for module in dit.blocks.modules()):
        raise ValueError("--shard splits no packed weights; load others, in bfloat16 for example (--dtype)")
    dit.fingerprint = weights_fingerprint(dit)  # while the weights are whole
    # It warns of queries and keys, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", category=UserWarning)
    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    blocks = [fully_shard(block, mesh=mesh, reshard_after_forward=True) for block in dit.blocks]
    for block in dit.blocks:
        register_fsdp_forward_method(block, LAST_OF_PASS)
    for block, coming in pairwise(blocks):
        block.set_modules_to_forward_prefetch([coming])
    holder = _Holder(dit.blocks)
    root = fully_shard(holder, mesh=mesh)
    holder()  # blocks that a called module holds share its streams
    return root


class _Holder(nn.Module):
    """Holds the blocks of a DiT, which are called one by one."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self) -> None:
        """Do nothing; FSDP adds what it does before and after."""
