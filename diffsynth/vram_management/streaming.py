"""Blocks whose weights come from CPU memory as they are needed, in the forward pass and in the backward pass.

The device holds the weights of two blocks, in two slots. While one block computes, the next one's weights are
copied into the other slot; in the backward pass the next one is the one before. In a pass a block always
uses the same slot: what autograd has kept of its weights are views of that slot, and before its backward
begins the same weights are in the same place again. So gradients need neither checkpoints nor copies.

Weights must be frozen while gradients are taken: none is computed for them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Mark = Any  # a point in a device's queue of work; what it is, only the copies that gave it know
LAST_OF_PASS = "queries_keys"  # method of a DiT block that is called instead of it, after which none runs


class ImmediateCopies:
    """Copies on a CPU, done when `start` returns; also the interface of asynchronous copies."""

    def start(self, into: Sequence[Tensor], source: Sequence[Tensor], after: Mark | None) -> Mark:  # noqa: ARG002
        """Copy each tensor once the work up to `after` is done; the mark is where the copies are."""
        for target, tensor in zip(into, source, strict=True):
            target.copy_(tensor)

    def wait(self, copied: Mark) -> None:
        """Work that is given from now on begins after these copies."""

    def mark(self) -> Mark:
        """Return a mark of the end of the work so far."""

    def finish(self) -> None:
        """Work that is given from now on begins after all copies."""


class SideStreamCopies(ImmediateCopies):
    """Copies on a separate CUDA stream; events order both streams, and nobody waits on the
    CPU. Source tensors should be page-locked: copies of others stop the caller (see `StagedCopies`)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def start(self, into: Sequence[Tensor], source: Sequence[Tensor], after: Mark | None) -> Mark:
        # Without a mark, everything given so far: the memory may still be in use for something else.
        self._side.wait_event(self.mark() if after is None else after)
        with torch.cuda.stream(self._side):
            for target, tensor in zip(into, source, strict=True):
                target.copy_(tensor, non_blocking=True)
            return self._side.record_event()

    def wait(self, copied: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def finish(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._side)


class StagedCopies(SideStreamCopies):
    """Copies of pageable tensors, which a thread brings into two page-locked buffers by turns, so that the
    caller goes on meanwhile. What fails in the thread is raised by `wait`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._thread = ThreadPoolExecutor(1, "staged copies")
        # With each buffer, the mark of the copy that last read it.
        self._buffers: list[tuple[Tensor, Mark]] = [(torch.empty(0, dtype=torch.uint8), None)] * 2

    def start(self, into: Sequence[Tensor], source: Sequence[Tensor], after: Mark | None) -> Mark:
        # The thread has a queue of work of its own, so the mark is taken here.
        return self._thread.submit(self._stage, into, source, self.mark() if after is None else after)

    def _stage(self, into: Sequence[Tensor], source: Sequence[Tensor], after: Mark) -> Mark:
        for target, tensor in zip(into, source, strict=True):
            buffer, read = self._buffers[0]
            if read is not None:
                read.synchronize()
            buffer = buffer if buffer.nbytes >= tensor.nbytes else page_locked(tensor.nbytes)
            copied = super().start([target], [stored(tensor, buffer)], after)
            self._buffers = [self._buffers[1], (buffer, copied)]
        return self._buffers[-1][1]

    def wait(self, copied: Mark) -> None:
        super().wait(copied.result())

    def finish(self) -> None:
        self._thread.submit(int).result()  # which is done after all that was given to the thread
        super().finish()


def page_locked(size: int) -> Tensor:
    """Return so many bytes of page-locked CPU memory; PyTorch takes a power of two from the system."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def stored(tensor: Tensor, buffer: Tensor) -> Tensor:
    """Return a copy of the tensor that lies in a buffer of bytes, from its start."""
    return buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@dataclass(slots=True)
class Slot:
    """Room on the device for one block: its tensors, which block is in them, and since when, until when."""

    tensors: list[Tensor]
    block: int | None = None
    copied: Mark | None = None
    used: Mark | None = None


class PassBlock(NamedTuple):
    """A block in a pass, and its slot; the slots of blocks in a row alternate."""

    block: int
    slot: int


class BlockStream:
    """Streams blocks, which must be alike, while it is armed; otherwise their weights are on the CPU.

    Passes run the blocks in order from the first, to any of them; passes with gradients may go back from it.

    Raises:
        ValueError: the blocks' tensors differ in shape or dtype.
    """

    def __init__(
        self, blocks: Sequence[nn.Module] | nn.ModuleList, device: torch.device, copies: ImmediateCopies
    ) -> None:
        self._blocks, self._device, self._copies = list(blocks), device, copies
        self._tensors: list[list[Tensor]] = []
        self._home: list[list[Tensor]] = []
        self._slots: list[Slot] = []
        self._hooks: list[RemovableHandle] = []
        self._active: PassBlock | None = None
        self._going_back = False
        self._first_slot = 0  # of the running pass
        self._next_first_slot = 0

    def arm(self) -> None:
        """Make room on the device, and from now on bring each block before it runs."""
        self._tensors = [tensors_of(block) for block in self._blocks]
        # The parameters themselves: loading and LoRAs may have replaced what an earlier call has seen.
        self._home = [[tensor.data for tensor in tensors] for tensors in self._tensors]
        if not alike(self._blocks):
            raise ValueError("blocks can only be streamed if their tensors have the same shapes and dtypes")
        self._slots = [Slot([torch.empty_like(t, device=self._device) for t in self._home[0]]) for _ in "ab"]
        for index, block in enumerate(self._blocks):
            self._hooks += [
                block.register_forward_pre_hook(lambda _block, _inputs, i=index: self._before(i)),
                block.register_forward_hook(lambda _block, _inputs, output, i=index: self._after(i, output)),
            ]
            if hasattr(block, LAST_OF_PASS):
                setattr(block, LAST_OF_PASS, self._brought(index, getattr(block, LAST_OF_PASS)))

    def disarm(self) -> None:
        """Give the room back; weights are where they were."""
        for hook in self._hooks:
            hook.remove()
        for block in self._blocks:
            vars(block).pop(LAST_OF_PASS, None)
        self._leave()
        self._copies.finish()
        self._hooks, self._slots, self._tensors, self._home = [], [], [], []
        self._first_slot = self._next_first_slot = 0
        self._going_back = False

    def _brought(self, index: int, method: Callable[..., tuple[Tensor, ...]]) -> Callable:
        """The method with the block's weights brought before it; the last of its pass."""

        def call(*inputs: Any) -> tuple[Tensor, ...]:
            self._before(index, last=True)
            output = method(*inputs)
            self._after(index, *output)
            return output

        return call

    def _before(self, index: int, last: bool = False) -> None:
        """A block of a forward pass is next."""
        if self._going_back and self._active is not None and self._active.block == index:
            return  # a checkpoint that is computed again: its weights are there
        self._going_back = False
        if index == 0:
            self._first_slot = self._next_first_slot
        here = PassBlock(index, (index + self._first_slot) % 2)
        self._enter(here)
        if not last and index < len(self._blocks) - 1:
            self._fetch(PassBlock(index + 1, 1 - here.slot))
        elif not torch.is_grad_enabled():
            # The next pass begins with block 0: into the slot that is free.
            self._next_first_slot = 1 - here.slot
            self._fetch(PassBlock(0, self._next_first_slot))

    def _after(self, index: int, *outputs: Tensor) -> None:
        here = PassBlock(index, (index + self._first_slot) % 2)
        for tensor in outputs:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                # Called when the gradient of the output is there: the block's backward is next.
                tensor.register_hook(lambda _gradient: self._go_back_to(here))

    @torch.no_grad()
    def _go_back_to(self, here: PassBlock) -> None:
        self._going_back = True
        self._enter(here)
        if here.block > 0:
            self._fetch(PassBlock(here.block - 1, 1 - here.slot))
        else:
            self._next_first_slot = here.slot

    def _enter(self, here: PassBlock) -> None:
        """Have the block's parameters be its slot's tensors, with its weights in them."""
        if self._active == here and self._slots[here.slot].block == here.block:
            return
        self._leave()
        self._fetch(here)
        slot = self._slots[here.slot]
        self._copies.wait(slot.copied)
        for tensor, room in zip(self._tensors[here.block], slot.tensors, strict=True):
            tensor.data = room
        self._active = here

    def _leave(self) -> None:
        """The active block's parameters are those in CPU memory again."""
        if self._active is None:
            return
        self._slots[self._active.slot].used = self._copies.mark()
        index = self._active.block
        for tensor, home in zip(self._tensors[index], self._home[index], strict=True):
            tensor.data = home
        self._active = None

    @torch.no_grad()
    def _fetch(self, coming: PassBlock) -> None:
        """Begin to copy a block's weights into its slot, unless they are there."""
        slot = self._slots[coming.slot]
        if slot.block != coming.block:
            slot.copied = self._copies.start(slot.tensors, self._home[coming.block], slot.used)
            slot.block = coming.block


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def alike(blocks: Sequence[nn.Module] | nn.ModuleList) -> bool:
    """Return whether the tensors of all blocks have the same shapes and dtypes."""
    return len({tuple((t.shape, t.dtype) for t in tensors_of(block)) for block in blocks}) <= 1


def resident_blocks(blocks: Sequence[nn.Module] | nn.ModuleList, num_params: int) -> int:
    """Return how many blocks, from the first, have at most num_params numbers together."""
    totals = accumulate(sum(tensor.numel() for tensor in tensors_of(block)) for block in blocks)
    return sum(total <= num_params for total in totals)
