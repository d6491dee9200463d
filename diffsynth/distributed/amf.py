"""Attention motion flow over several ranks: each describes the pairs (i, j) of its own frames i.

For that it needs its frames and the sf - 1 after them (the halo), as features without heads, which are sent
to it token by token from the ranks that computed them. The parts of the loss are then summed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffsynth.distributed.collectives import exchanged, summed
from diffsynth.models.local_attention import Grid
from diffsynth.motion.amf import DenseAMF, TileAMF
from diffsynth.motion.descriptors import Loss, StepInputs
from diffsynth.motion.flow import MotionFlow, frame_pairs
from diffsynth.motion.heads import reduce_heads

LocalFeatures = tuple[Tensor, Tensor, int]  # q and k [f, H, W, d] of a rank's frames and halo; all frames


@dataclass(frozen=True, slots=True)
class SpreadAMF:
    """Dense or tile flow whose pairs and loss are spread over the ranks of a group.

    Attributes:
        whole: the descriptor of one process.
        local_features: as `SequenceParallel.local_features`.
    """

    whole: DenseAMF
    local_features: Callable[..., tuple[Tensor, Tensor, Grid]]
    group: dist.ProcessGroup

    def observe(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> LocalFeatures:
        """Return features of this rank's frames, without heads."""
        grids: list[Grid] = []

        def features(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            q, k, grid = self.local_features(*arguments, **named)
            grids.append(grid)
            return q, k

        dit: Any = SimpleNamespace(num_layers=inputs.dit.num_layers, features=features)
        q, k = self.whole.observe(latents, context, replace(inputs, dit=dit))
        q, k = reduce_heads(q[None, None], k[None, None], self.whole.guidance.heads)
        return self._of_frames(torch.cat([q, k], -1)[0, 0], grids[0])

    def describe(self, features: LocalFeatures, reference: MotionFlow | None = None) -> MotionFlow:
        """Return the flow of the pairs of this rank's frames, which are numbered from its first."""
        q, k, num_frames = features
        first, stop, _ = self._frames(dist.get_rank(self.group), num_frames)
        span = frame_pairs(num_frames, self.whole.guidance.sf)
        pairs = [(i - first, j - first) for i, j in span if first <= i < stop]
        if not pairs:  # connected to the features, as other ranks wait for their gradient
            return MotionFlow(flow=q[..., :2], pairs=[])
        return self.whole.describe((q, k), reference, pairs)

    def loss(self, descriptor: MotionFlow, reference: MotionFlow) -> Loss:
        """Return the loss over the pairs of all ranks: each counts by its share of the pairs.

        The window loss counts by the share of the frames that have two later ones.
        """
        firsts = [i for i, _ in descriptor.pairs]
        own = descriptor.flow.new_tensor([len(firsts), sum(firsts.count(i) > 2 for i in set(firsts))])
        amf_share, window_share = (own / summed(own, self.group).clamp(min=1)).tolist()
        if firsts:
            guidance = self.whole.guidance
            weights = {"amf_weight": amf_share, "window_weight": window_share}
            weights = {name: share * getattr(guidance, name) for name, share in weights.items()}
            total, parts = type(self.whole)(replace(guidance, **weights)).loss(descriptor, reference)
        else:
            total, parts = descriptor.flow.sum(), {}
        none = total.detach().new_zeros(())
        amf, window = amf_share * parts.get("amf", none), window_share * parts.get("window", none)
        total, amf, window = summed(torch.stack([total, amf, window]), self.group)
        named = {"amf": amf.detach(), "window": window.detach()}
        return Loss(total, named if isinstance(self.whole, TileAMF) else {"amf": named["amf"]})

    def _of_frames(self, tokens: Tensor, grid: Grid) -> LocalFeatures:
        """Send each rank the tokens of its frames and halo: this rank's tokens [n, 2 d] -> q, k."""
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        area, num_tokens = prod(grid[1:]), prod(grid)
        wanted = [
            (first * area, stop * area)
            for first, _, stop in map(self._frames, range(ranks), [grid[0]] * ranks)
        ]
        held = [
            (min(num_tokens, r * len(tokens)), min(num_tokens, (r + 1) * len(tokens))) for r in range(ranks)
        ]

        def common(a: tuple[int, int], b: tuple[int, int]) -> range:
            return range(max(a[0], b[0]), min(a[1], b[1]))

        start = held[rank][0]
        parts = [common(held[rank], span) for span in wanted]
        sent = torch.cat(
            [tokens[part.start - start : part.stop - start] if part else tokens[:0] for part in parts]
        )
        received = [len(common(span, wanted[rank])) for span in held]
        own = exchanged(sent, [len(part) for part in parts], received, self.group)
        q, k = own.unflatten(0, (-1, *grid[1:])).chunk(2, dim=-1)
        return q, k, grid[0]

    def _frames(self, rank: int, num_frames: int) -> tuple[int, int, int]:
        """Return the first frame of a rank, the one after its last, and the one after its halo."""
        ranks, sf = dist.get_world_size(self.group), self.whole.guidance.sf
        first, stop = num_frames * rank // ranks, num_frames * (rank + 1) // ranks
        return first, stop, min(num_frames, stop + sf - 1) if first < stop else stop
