"""Which models, and which of their blocks, are on the compute device while a stage runs."""

import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from diffsynth.vram_management.copies import ImmediateCopies, SideStreamCopies
from diffsynth.vram_management.memory import available_memory
from diffsynth.vram_management.streaming import BlockStream, resident_blocks, tensors_of

CPU = torch.device("cpu")


class Residency:
    """Brings models to the compute device when a stage needs them.

    Without offload a model stays there once it came; with offload it rests on the CPU and is on the device
    only inside `using`: copies of its weights come, and go without being copied back, so that weights which
    are mapped from a file stay mapped. Models come on first use, so that a large one need not fit beside the
    others. Of a model that streams, blocks come one by one as they run (see `streaming`).
    """

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device) -> None:
        self.models = dict(models)
        self.device = device
        self.offload = False
        self._turn = threading.RLock()
        self._taken = False
        self._streams: dict[str, tuple[BlockStream, Sequence[nn.Module]]] = {}
        # Of each model that came for a stage: its tensors, and their values on the CPU.
        self._homes: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @property
    def streaming(self) -> tuple[str, ...]:
        """Return the names of the models whose blocks are streamed."""
        return tuple(self._streams)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Return a context in which no other thread has the models; it waits until one that has them is done.

        In it PyTorch is in its plain state, whatever the caller has set: gradients can be taken, new tensors
        are float32, and nothing is cast.

        Raises:
            RuntimeError: this thread has them already, as in a callback of a run.
        """
        with self._turn:
            if self._taken:
                raise RuntimeError("the pipeline is running: its callbacks cannot call it again")
            self._taken = True
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            try:
                with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
                    yield
            finally:
                torch.set_default_dtype(default)
                self._taken = False

    def stream(
        self, name: str, blocks: Sequence[nn.Module] | nn.ModuleList, num_persistent_params: int = 0
    ) -> None:
        """Stream blocks of a model from the next stage on; the first ones stay on the device.

        Everything is offloaded between stages. Weights are page-locked where an accelerator reads them, so
        that copies run beside its work, unless they would take more than half of the free CPU memory.

        Args:
            name: of the model.
            blocks: of the model, in the order in which they run.
            num_persistent_params: most parameters of the blocks that stay.
        """
        with self._turn:
            self.rest()
            self.offload = True
            self._streams.pop(name, None)
        streamed = list(blocks)[resident_blocks(blocks, num_persistent_params) :]
        if not streamed:
            return
        copies = ImmediateCopies()
        if self.device.type == "cuda":
            page_lock(streamed)
            copies = SideStreamCopies(self.device)
        self._streams[name] = (BlockStream(streamed, self.device, copies), streamed)

    def stop_streaming(self) -> None:
        """Have models come whole again from the next stage on."""
        with self._turn:
            self._streams.clear()

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Inside this context the named models are on the compute device; an error sends them back, too."""
        with self._turn, ExitStack() as leaving:
            if self.offload:
                leaving.callback(self.rest, *names)
            for name in names:
                stream, blocks = self._streams.get(name, (None, ()))
                self._bring(name, but=blocks)
                if stream is not None:
                    leaving.callback(stream.disarm)
                    stream.arm()
            yield

    def rest(self, *names: str) -> None:
        """Move the named models (all by default) to the CPU and hand their memory back."""
        with self._turn:
            for name in names or self.models:
                for tensor, home in self._homes.pop(name, ()):
                    tensor.data = home
                self.models[name].to("cpu")
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    def _bring(self, name: str, but: Sequence[nn.Module] = ()) -> None:
        """Copy a model's weights to the device, but for those of some blocks."""
        staying = {id(tensor) for block in but for tensor in tensors_of(block)}
        homes = self._homes.setdefault(name, []) if self.offload else []
        for tensor in tensors_of(self.models[name]):
            if id(tensor) in staying:
                continue
            home = tensor.data
            tensor.data = copy_to(self.device, home)
            if tensor.data_ptr() != home.data_ptr():
                homes.append((tensor, home))


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a tensor on a device; the tensor itself if it is on it."""
    return tensor.to(device)


def page_lock(blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
    """Move the blocks' weights to page-locked CPU memory, if they take at most half of what is free."""
    tensors = [tensor for block in blocks for tensor in tensors_of(block)]
    if sum(tensor.nbytes for tensor in tensors) > available_memory(CPU) // 2:
        return
    for tensor in tensors:
        if not tensor.data.is_pinned():
            tensor.data = tensor.data.pin_memory()
