"""Run a DiT on several ranks (sequence parallelism): each computes some tokens of one or both prompts.

`spread` replaces methods of a loaded DiT and of its self-attention layers. These dimensions are split:

    tokens [B, S, D], rotary table [S, 1, d/2, 2]  S, into P consecutive shares of n = ceil(S / P) tokens
    q, k, v [B, n, N, d]                         N inside attention, by all-to-all, if P divides N or a window
                                                 is set (N is then zero-padded); otherwise q stays split over
                                                 S, and k and v are gathered
    pairs of frames (i, j) of AMF                i (see `amf`)
    two prompts in one batch                     B, over the halves of an even number of ranks

The last shares may be short: they are zero-padded, and no token attends to the padding.
Latents, texts, time, caches and results are equal on all P ranks. Axes are named as in `wan_video_dit`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple, cast

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


class Mesh(NamedTuple):
    """Process groups of a rank: all ranks, those with the same prompt, and its partner with the other."""

    world: dist.ProcessGroup
    prompt: dist.ProcessGroup
    prompts: dist.ProcessGroup | None = None

    @classmethod
    def over_all(cls, device_type: str) -> "Mesh":
        """Return the mesh over all ranks; an even number of them is halved, with one prompt for each half."""
        world, size = cast(dist.ProcessGroup, dist.group.WORLD), dist.get_world_size()
        if size % 2:
            return cls(world, world)
        mesh = dist.init_device_mesh(device_type, (2, size // 2), mesh_dim_names=("cfg", "cp"))
        return cls(world, mesh.get_group("cp"), mesh.get_group("cfg"))


class SequenceParallel:
    """Replacements for the methods of a DiT, which has all its weights on each rank of a mesh."""

    def __init__(self, dit: WanModel, mesh: Mesh, rung: Mapping[str, Any] | None = None) -> None:
        self.dit, self.mesh, self.rung = dit, mesh, rung
        self.group = mesh.world  # the ranks of the current forward pass

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return dist.get_world_size(self.mesh.world)

    @staticmethod
    def agreed(value: Any) -> Any:
        """Return rank 0's value."""
        dist.broadcast_object_list(values := [value])
        return values[0]

    def descriptor(self, descriptor: MotionDescriptor) -> MotionDescriptor:
        """Return a descriptor that splits its work, if it can; others do all their work on every rank."""
        if not isinstance(descriptor, DenseAMF) or type(descriptor) not in (DenseAMF, TileAMF):
            return descriptor
        all_at_once = descriptor.guidance.heads == "token_groups"
        return descriptor if all_at_once else SpreadAMF(descriptor, self.local_features, self.mesh.world)

    def forward(self, x: Tensor, *inputs: Tensor | None, **named: Tensor | None) -> Tensor:
        """As `WanModel.forward`."""
        check_equal(x, "the latents", self.mesh.world)
        return self._by_prompt(self._velocity, x, *inputs, **named)

    def features(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """As `WanModel.features`."""
        *qk, grid = self.local_features(*inputs, **named)
        q, k = (self._whole(x, grid).unflatten(1, grid) for x in qk)
        return q, k

    def local_features(
        self, x: Tensor, *inputs: Tensor, block: int = 14, attention_window: Window | None = None,
        checkpoint: str = "none", **named: Any,
    ) -> tuple[Tensor, Tensor, Grid]:  # fmt: skip
        """Return q and k [B, n, N, d] of this rank's tokens, and the grid of all; arguments as `features`.

        The gradient of x is summed over the ranks' tokens.
        """
        self.group = self.mesh.world
        check_equal(x, "the latents", self.group)
        state = self._embed(sum_gradients(x, self.group), *inputs, **named)
        state = replace(state, attention_window=attention_window)
        tokens = WanModel.run_blocks(self.dit, state, block, checkpoint)
        return *cast(DiTBlock, self.dit.blocks[block]).queries_keys(tokens, state), state.grid

    def run_blocks(self, state: DiTState, *span: Any, **named: Any) -> Tensor:
        """As `WanModel.run_blocks`, for step caches: tokens in and out are those of all ranks."""

        def run(**inputs: Any) -> Tensor:
            own = self._own(replace(state, **inputs), state.grid, 0)
            return self._whole(WanModel.run_blocks(self.dit, own, *span, **named), state.grid)

        names = ("tokens", "time", "modulation", "context", "image_context")
        return self._by_prompt(run, **{name: getattr(state, name) for name in names})

    def attend(
        self, layer: SelfAttention, x: Tensor, rope: Tensor, grid: Grid, window: Window | None = None, *_: Any
    ) -> Tensor:
        """As `SelfAttention.forward`, for the tokens x [B, n, D] of this rank among those of all."""
        ranks, num_tokens, heads = dist.get_world_size(self.group), prod(grid), layer.num_heads
        q, k = layer.queries_keys(x, rope)
        v = layer.heads(layer.v(x))
        if window is None and heads % ranks:
            kv = gathered(torch.stack([k, v])[None], self.group).movedim(0, 2).flatten(2, 3)
            return layer.o(attention(q, *kv[:, :, :num_tokens]).flatten(2))
        qkv = F.pad(torch.stack([q, k, v]), (0, 0, 0, -heads % ranks)).unflatten(3, (ranks, -1))
        qkv = exchanged(qkv.movedim(3, 0), self.group).movedim(0, 2).flatten(2, 3)[:, :, :num_tokens]
        seen = attention(*qkv) if window is None else local_attention(*qkv, grid=grid, window=window)
        seen = F.pad(seen, (0, 0, 0, 0, 0, ranks * x.shape[1] - num_tokens)).unflatten(1, (ranks, -1))
        seen = exchanged(seen.movedim(1, 0), self.group).movedim(0, 2).flatten(2, 3)
        return layer.o(seen[:, :, :heads].flatten(2))

    def _by_prompt(self, run: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
        """Run each of two samples on its half of the ranks, or a single sample on all ranks."""
        prompts, given = self.mesh.prompts, [*inputs, *named.values()]
        if prompts is None or all(tensor is None or len(tensor) != 2 for tensor in given):
            self.group = self.mesh.world
            return run(*inputs, **named)
        self.group, own = self.mesh.prompt, dist.get_rank(prompts)
        parts = [t if t is None or len(t) == 1 else t[own : own + 1] for t in given]
        named = dict(zip(named, parts[len(inputs) :], strict=True))
        return collected(run(*parts[: len(inputs)], **named), prompts)

    def _velocity(self, *inputs: Any, **named: Any) -> Tensor:
        state = self._embed(*inputs, **named)
        patches = self.dit.head(WanModel.run_blocks(self.dit, state), state.time)
        return self.dit.unpatchify(self._whole(patches, state.grid), state.grid)

    def _embed(
        self, x: Tensor, timestep: Tensor, context: Tensor, clip_feature: Any = None, y: Tensor | None = None
    ) -> DiTState:
        """Return the state of this rank's tokens; only the frames that hold them are embedded."""
        frames, rows, cols = (n // p for n, p in zip(x.shape[2:], self.dit.patch_size, strict=True))
        start, stop, _ = self._share((frames, rows, cols))
        first = min(start // (rows * cols), frames - 1)
        last = max(first + 1, -(-stop // (rows * cols)))
        seen = slice(first * self.dit.patch_size[0], last * self.dit.patch_size[0])
        if timestep.ndim == 2:
            a_frame = timestep.shape[1] // frames
            timestep = timestep[:, first * a_frame : last * a_frame]
        pictures = None if y is None else y[:, :, seen]
        state = WanModel.embed(self.dit, x[:, :, seen], timestep, context, clip_feature, pictures)
        return self._own(state, (frames, rows, cols), first * rows * cols)

    def _own(self, state: DiTState, grid: Grid, offset: int) -> DiTState:
        """Cut this rank's share out of a state whose tokens begin at token `offset` of the grid."""
        start, stop, count = self._share(grid)
        num_tokens = state.tokens.shape[1]

        def own(x: Tensor, first: int = offset) -> Tensor:
            """[B, num_tokens or one a frame, ...] -> [B, n, ...]."""
            x = x.repeat_interleave(num_tokens // x.shape[1], dim=1) if x.shape[1] < num_tokens else x
            x = x[:, start - first : max(start, stop) - first]
            return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, count - x.shape[1]))

        rope = rotary_table(grid, self.dit.dim // self.dit.num_heads, state.tokens.device, state.tokens.dtype)
        names = ("tokens", "time", "modulation") if state.time.ndim == 3 else ("tokens",)
        cut: dict[str, Any] = {name: own(getattr(state, name)) for name in names}
        return replace(state, **cut, rope=own(rope[None], 0)[0], grid=grid)

    def _share(self, grid: Grid) -> tuple[int, int, int]:
        """Return this rank's first token, the token after its last, and the number in a full share."""
        num_tokens = prod(grid)
        count = -(-num_tokens // dist.get_world_size(self.group))
        start = min(num_tokens, count * dist.get_rank(self.group))
        return start, min(num_tokens, start + count), count

    def _whole(self, x: Tensor, grid: Grid) -> Tensor:
        """Gather the ranks' shares [B, n, ...] as [B, S, ...]; all ranks then compute the same from it."""
        return collected(x.transpose(0, 1), self.group)[: prod(grid)].transpose(0, 1)


def spread(dit: WanModel, mesh: Mesh, rung: Mapping[str, Any] | None = None) -> AbstractContextManager[None]:
    """Spread a DiT over a mesh in this context, which sets `dit.spread`; a rung is its memory settings."""
    parallel = SequenceParallel(dit, mesh, rung)
    names = ("forward", "features", "run_blocks", "spread")
    layers = [cast(DiTBlock, block).self_attn for block in dit.blocks]
    return replaced(
        *((dit, name, getattr(parallel, name, parallel)) for name in names),
        *((layer, "forward", partial(parallel.attend, layer)) for layer in layers),
    )


@contextmanager
def replaced(*attributes: tuple[Any, str, Any]) -> Iterator[None]:
    """Replace attributes of objects, each given with its name and new value, in this context."""
    try:
        for owner, name, value in attributes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, _ in attributes:
            vars(owner).pop(name, None)
