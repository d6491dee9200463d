"""One DiT over several ranks: each computes a share of the tokens (sequence parallel), of one prompt or both.

Applied from outside: `spread` replaces methods of a loaded DiT and of its self-attentions, and puts the old
ones back. What is split:

    tokens [B, S, D], rotary table [S, 1, d/2]   S, in P shares of n = ceil(S / P) tokens in their order
    q, k, v [B, n, N, d]                         N inside attention, by all-to-all, if P divides N or a window
                                                 is set (N is then filled up with zeros); else q stays split
                                                 over S, and k and v are gathered
    flow pairs (i, j) of AMF                     i, in P shares of frames (see `amf`)
    two prompts in one batch                     B, over the halves of an even number of ranks

The last share may be short: it is filled up with zeros, which are cut off before anybody attends to them.
Latents, texts, time, caches and results are equal on all ranks. Axes as in `wan_video_dit`; P ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from diffsynth.distributed.amf import SpreadAMF
from diffsynth.distributed.collectives import check_equal, collected, exchanged, gathered, sum_gradients
from diffsynth.models.attention import attention
from diffsynth.models.local_attention import Grid, Window, local_attention
from diffsynth.models.wan_video_dit import DiTBlock, DiTState, WanModel
from diffsynth.models.wan_video_dit_layers import SelfAttention, rotary_table
from diffsynth.motion.amf import DenseAMF, TileAMF
from diffsynth.motion.descriptors import MotionDescriptor


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """The groups of a rank.

    Attributes:
        world: all ranks.
        prompt: the ranks that compute the same prompt of two; `world` if prompts are not split.
        prompts: this rank's partner for the other prompt, and itself; None if prompts are not split.
    """

    world: dist.ProcessGroup
    prompt: dist.ProcessGroup
    prompts: dist.ProcessGroup | None

    @classmethod
    def over_all(cls, device_type: str) -> "Mesh":
        """Return the mesh over all ranks: halves for two prompts if their number is even."""
        world, size = dist.group.WORLD, dist.get_world_size()
        assert world is not None
        if size % 2:
            return cls(world=world, prompt=world, prompts=None)
        mesh = dist.init_device_mesh(device_type, (2, size // 2), mesh_dim_names=("cfg", "cp"))
        return cls(world=world, prompt=mesh.get_group("cp"), prompts=mesh.get_group("cfg"))


class SequenceParallel:
    """What stands in for the methods of a DiT whose tokens are spread over ranks.

    Args:
        dit: the DiT, whole on each rank.
        mesh: groups of this rank.
    """

    def __init__(self, dit: WanModel, mesh: Mesh) -> None:
        self.dit, self.mesh = dit, mesh
        self.group = mesh.world  # of the pass that runs

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return dist.get_world_size(self.mesh.world)

    def descriptor(self, descriptor: MotionDescriptor) -> MotionDescriptor:
        """Return a motion descriptor whose work is spread, too; one that cannot be works on all features."""
        if type(descriptor) in (DenseAMF, TileAMF) and descriptor.guidance.heads != "token_groups":  # type: ignore[attr-defined]
            return SpreadAMF(descriptor, self.local_features, self.mesh.world)  # type: ignore[arg-type]
        return descriptor

    def forward(self, x: Tensor, *inputs: Tensor | None, **named: Tensor | None) -> Tensor:
        """As `WanModel.forward`."""
        check_equal(x, "the latents", self.mesh.world)
        return self._by_prompt(self._velocity, x, *inputs, **named)

    def features(self, x: Tensor, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """As `WanModel.features`."""
        q, k, grid = self.local_features(x, *inputs, **named)
        return self._whole(q, grid).unflatten(1, grid), self._whole(k, grid).unflatten(1, grid)

    def local_features(
        self, x: Tensor, timestep: Tensor, context: Tensor, *, block: int = 14,
        clip_feature: Tensor | None = None, y: Tensor | None = None, attention_window: Window | None = None,
        **checkpointing: bool,
    ) -> tuple[Tensor, Tensor, Grid]:  # fmt: skip
        """Return q and k [B, n, N, d] of this rank's tokens, and the grid of all; differentiable.

        Arguments as for `WanModel.features`. The gradient of x is that of all ranks' tokens.
        """
        self.group = self.mesh.world
        check_equal(x, "the latents", self.group)
        state = self._embed(sum_gradients(x, self.group), timestep, context, clip_feature, y)
        state = replace(state, attention_window=attention_window)
        tokens = WanModel.run_blocks(self.dit, state, block, **checkpointing)
        reading: Any = self.dit.blocks[block]
        return *reading.queries_keys(tokens, state), state.grid

    def run_blocks(self, state: DiTState, *span: Any, **named: Any) -> Tensor:
        """As `WanModel.run_blocks`, for step caches: tokens in and out are those of all ranks."""

        def run(tokens: Tensor, time: Tensor, modulation: Tensor, *texts: Tensor | None) -> Tensor:
            names = ("tokens", "time", "modulation", "context", "image_context")
            inputs: Any = dict(zip(names, (tokens, time, modulation, *texts), strict=True))
            own = self._own(replace(state, **inputs), state.grid, 0)
            return self._whole(WanModel.run_blocks(self.dit, own, *span, **named), state.grid)

        texts = state.context, state.image_context
        return self._by_prompt(run, state.tokens, state.time, state.modulation, *texts)

    def attend(
        self, layer: SelfAttention, x: Tensor, rope: Tensor, grid: Grid, window: Window | None = None
    ) -> Tensor:
        """As `SelfAttention.forward`, for the tokens x [B, n, D] of this rank among those of all."""
        ranks, num_tokens, heads = dist.get_world_size(self.group), prod(grid), layer.num_heads
        q, k = layer.queries_keys(x, rope)
        v = layer.heads(layer.v(x))
        if window is None and heads % ranks:
            k, v = (
                gathered(torch.stack([k, v])[None], self.group).movedim(0, 2).flatten(2, 3)[:, :, :num_tokens]
            )
            return layer.o(attention(q, k, v).flatten(2))
        one_each = [1] * ranks
        qkv = F.pad(torch.stack([q, k, v]), (0, 0, 0, -heads % ranks)).unflatten(3, (ranks, -1))
        qkv = exchanged(qkv.movedim(3, 0), one_each, one_each, self.group)
        q, k, v = qkv.movedim(0, 2).flatten(2, 3)[:, :, :num_tokens]
        seen = attention(q, k, v) if window is None else local_attention(q, k, v, grid=grid, window=window)
        seen = F.pad(seen, (0, 0, 0, 0, 0, ranks * x.shape[1] - num_tokens)).unflatten(1, (ranks, -1))
        seen = exchanged(seen.movedim(1, 0), one_each, one_each, self.group)
        return layer.o(seen.movedim(0, 2).flatten(2, 3)[:, :, :heads].flatten(2))

    def _by_prompt(
        self, run: Callable[..., Tensor], *inputs: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """Run two samples each on one half of the ranks, and one on all of them."""
        prompts, first = self.mesh.prompts, inputs[0]
        assert first is not None
        if prompts is None or len(first) != 2:
            self.group = self.mesh.world
            return run(*inputs, **named)
        self.group = self.mesh.prompt
        own = slice(dist.get_rank(prompts), dist.get_rank(prompts) + 1)

        def part(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or len(tensor) == 1 else tensor[own]

        return collected(run(*map(part, inputs), **{n: part(t) for n, t in named.items()}), prompts)

    def _velocity(
        self, x: Tensor, timestep: Tensor, context: Tensor, clip_feature: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        state = self._embed(x, timestep, context, clip_feature, y)
        patches = self.dit.head(WanModel.run_blocks(self.dit, state), state.time)
        return self.dit.unpatchify(self._whole(patches, state.grid), state.grid)

    def _embed(
        self, x: Tensor, timestep: Tensor, context: Tensor, clip_feature: Tensor | None, y: Tensor | None
    ) -> DiTState:
        """Return the state of this rank's tokens; only the frames that hold them are embedded."""
        frames, rows, cols = (n // p for n, p in zip(x.shape[2:], self.dit.patch_size, strict=True))
        area, (start, stop, _) = rows * cols, self._share((frames, rows, cols))
        first, last = start // area, max(start // area + 1, -(-stop // area))
        if start == stop:  # more ranks than shares
            first, last = 0, 1
        seen = slice(first * self.dit.patch_size[0], last * self.dit.patch_size[0])
        if timestep.ndim == 2:
            a_frame = timestep.shape[1] // frames
            timestep = timestep[:, first * a_frame : last * a_frame]
        pictures = None if y is None else y[:, :, seen]
        state = WanModel.embed(self.dit, x[:, :, seen], timestep, context, clip_feature, pictures)
        return self._own(state, (frames, rows, cols), first * area)

    def _own(self, state: DiTState, grid: Grid, offset: int) -> DiTState:
        """Cut this rank's share out of a state whose tokens begin at token `offset` of the grid."""
        start, stop, count = self._share(grid)
        num_tokens = state.tokens.shape[1]

        def own(x: Tensor) -> Tensor:
            """[B, num_tokens or fewer, ...] -> [B, n, ...]."""
            if x.shape[1] != num_tokens:  # one a frame
                x = x.repeat_interleave(num_tokens // x.shape[1], dim=1)
            x = x[:, start - offset : stop - offset] if start < stop else x[:, :0]
            return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, count - x.shape[1]))

        rope = rotary_table(grid, self.dit.dim // self.dit.num_heads, state.tokens.device, state.tokens.dtype)
        rope = torch.cat([rope[start:stop], rope[:1].expand(count - (stop - start), -1, -1)])
        per_token = state.time.ndim == 3
        return replace(
            state,
            tokens=own(state.tokens),
            time=own(state.time) if per_token else state.time,
            modulation=own(state.modulation) if per_token else state.modulation,
            rope=rope,
            grid=grid,
        )

    def _share(self, grid: Grid) -> tuple[int, int, int]:
        """Return the first of this rank's tokens, the one after its last, and the tokens of a full share."""
        num_tokens, ranks = prod(grid), dist.get_world_size(self.group)
        count = -(-num_tokens // ranks)
        start = min(num_tokens, count * dist.get_rank(self.group))
        return start, min(num_tokens, start + count), count

    def _whole(self, x: Tensor, grid: Grid) -> Tensor:
        """Join the shares [B, n, ...] of ranks that then compute the same: [B, S, ...]."""
        return collected(x.transpose(0, 1), self.group)[: prod(grid)].transpose(0, 1)


@contextmanager
def spread(dit: WanModel, mesh: Mesh) -> Iterator[SequenceParallel]:
    """Spread a DiT over the ranks of a mesh in this context; `dit.spread` is there meanwhile.

    All ranks must have the same weights and call the DiT alike.
    """
    parallel = SequenceParallel(dit, mesh)
    names = {"spread": parallel}
    names |= {name: getattr(parallel, name) for name in ("forward", "features", "run_blocks")}
    layers = [block.self_attn for block in dit.blocks if isinstance(block, DiTBlock)]
    try:
        for name, stand_in in names.items():
            setattr(dit, name, stand_in)
        for layer in layers:
            layer.forward = partial(parallel.attend, layer)  # type: ignore[method-assign]
        yield parallel
    finally:
        for name in names:
            vars(dit).pop(name, None)
        for layer in layers:
            vars(layer).pop("forward", None)
