"""Attention motion flow over several ranks: each describes the pairs (i, j) of its own frames i.

For that it reads its frames and the sf - 1 after them, as features without heads, which are small enough for
every rank to have them all. The ranks' parts of the loss are then summed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffsynth.distributed.collectives import gathered, summed
from diffsynth.models.local_attention import Grid
from diffsynth.motion.amf import DenseAMF, TileAMF
from diffsynth.motion.descriptors import Loss, StepInputs
from diffsynth.motion.flow import MotionFlow, frame_pairs
from diffsynth.motion.heads import reduce_heads


@dataclass(frozen=True, slots=True)
class SpreadAMF:
    """Dense or tile flow whose pairs and loss are spread over the ranks of a group."""

    whole: DenseAMF  # the descriptor of one process
    local_features: Callable[..., tuple[Tensor, Tensor, Grid]]  # those of `SequenceParallel`
    group: dist.ProcessGroup  # of the ranks

    def observe(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Return queries and keys [F, H, W, d] of all frames, without heads."""
        grids: list[Grid] = []

        def features(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            q, k, grid = self.local_features(*arguments, **named)
            grids.append(grid)
            return q, k

        dit: Any = SimpleNamespace(num_layers=inputs.dit.num_layers, features=features)
        q, k = self.whole.observe(latents, context, replace(inputs, dit=dit))
        tokens = torch.cat(reduce_heads(q[None, None], k[None, None], self.whole.guidance.heads), -1)[0, 0]
        q, k = gathered(tokens, self.group)[: prod(grids[0])].unflatten(0, grids[0]).chunk(2, dim=-1)
        return q, k

    def describe(self, features: tuple[Tensor, Tensor], reference: MotionFlow | None = None) -> MotionFlow:
        """Return the flow of the pairs of this rank's frames, which are numbered from its first."""
        frames, sf = len(features[0]), self.whole.guidance.sf
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        first, stop = frames * rank // ranks, frames * (rank + 1) // ranks
        pairs = [(i - first, j - first) for i, j in frame_pairs(frames, sf) if first <= i < stop]
        if not pairs:  # connected to the features, as other ranks wait for their gradient
            return MotionFlow(flow=features[0][:0, ..., :2], pairs=[])
        q, k = (x[first : stop + sf - 1] for x in features)
        return self.whole.describe((q, k), reference, pairs)

    def loss(self, descriptor: MotionFlow, reference: MotionFlow) -> Loss:
        """Return the loss over the pairs of all ranks: each counts by its share of the pairs.

        The window loss counts by the share of the frames that have two later ones.
        """
        firsts = [i for i, _ in descriptor.pairs]
        own = descriptor.flow.new_tensor([len(firsts), sum(firsts.count(i) > 2 for i in set(firsts))])
        shares = dict(zip(("amf", "window"), own / summed(own, self.group).clamp(min=1), strict=True))
        total, parts = descriptor.flow.sum(), {name: own.new_zeros(()) for name in shares}
        if firsts:
            guidance = self.whole.guidance
            weights = {f"{n}_weight": s.item() * getattr(guidance, f"{n}_weight") for n, s in shares.items()}
            total, found = type(self.whole)(replace(guidance, **weights)).loss(descriptor, reference)
            parts |= {name: shares[name] * part for name, part in found.items()}
        total, *sums = summed(torch.stack([total, *parts.values()]), self.group)
        named = {name: part.detach() for name, part in zip(parts, sums, strict=True)}
        return Loss(total, named if isinstance(self.whole, TileAMF) else {"amf": named["amf"]})
