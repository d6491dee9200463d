"""Weights of a DiT's blocks split over all ranks by FSDP2: each keeps 1/N, for models larger than one GPU.

A block's weights are gathered before it runs, forward and backward, while the block before it computes, and
freed after it: a rank holds its shares and, while FSDP copies, three blocks. Results stay the same.
"""

import warnings

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from diffsynth.models.packed_linear import PackedLinear
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.vram_management.streaming import LAST_OF_PASS


def shard(dit: WanModel, device_type: str) -> None:
    """Split the blocks of a DiT with equal weights on all ranks, for good; ValueError if they are packed."""
    if any(isinstance(module, PackedLinear) for module in dit.blocks.modules()):
        raise ValueError("--shard splits no packed weights; load others, in bfloat16 for example (--dtype)")
    vars(dit)["fingerprint"] = weights_fingerprint(dit)  # while the weights are whole
    # It warns of queries and keys, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", category=UserWarning)
    mesh = dist.init_device_mesh(device_type, (dist.get_world_size(),))
    blocks = [fully_shard(block, mesh=mesh, reshard_after_forward=True) for block in dit.blocks]
    for index, block in enumerate(blocks):
        register_fsdp_forward_method(dit.blocks[index], LAST_OF_PASS)
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 2])
        # With none, FSDP would choose one: the last block of the pass before.
        block.set_modules_to_backward_prefetch([blocks[max(index - 1, 0)]])
    holder = nn.Identity()
    holder.add_module("blocks", dit.blocks)
    fully_shard(holder, mesh=mesh)
    holder(None)  # blocks in the first module that is called share its streams
