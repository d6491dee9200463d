"""Decide which models, and which of their blocks, are on the compute device while a stage runs."""

import gc
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from weakref import ref

import torch
from torch import Tensor, nn

from diffsynth.vram_management.memory import available_memory
from diffsynth.vram_management.streaming import (
    BlockStream,
    ImmediateCopies,
    SideStreamCopies,
    StagedCopies,
    page_locked,
    resident_blocks,
    stored,
    tensors_of,
)

CPU = torch.device("cpu")


class Residency:
    """Brings models to the compute device when a stage needs them.

    Without offload, a model stays there after its first use. With offload, its weights stay on the CPU, and
    `using` makes copies on the device that are dropped, not copied back. Weights that are mapped from files
    stay mapped either way. Models are moved on first use, so that a large one need not fit beside the others.
    The blocks of a streamed model are copied one by one as they run (see streaming.py).
    """

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device) -> None:
        self.models = dict(models)
        self.device = device
        self.offload = False
        self.staying: set[str] = set()  # names of models that stay on the device, also with offload
        self.settled = False  # whether models are where the caller wants them; else each run plans for itself
        self._turn = threading.RLock()
        self._taken = False
        self._streams: dict[str, tuple[BlockStream, Sequence[nn.Module]]] = {}
        # Of models on the device: a tensor, its data on the CPU, the copy's storage, the tensor's version.
        self._homes: dict[str, list[tuple[Tensor, Tensor, ref[torch.UntypedStorage], int]]] = {}

    @property
    def streaming(self) -> tuple[str, ...]:
        """Return the names of the models whose blocks are streamed."""
        return tuple(self._streams)

    @contextmanager
    def exclusive(self, deterministic: bool = False) -> Iterator[None]:
        """Return a context in which only this thread uses the models; entering it waits for other threads.

        Inside it, PyTorch's modes are the defaults, whatever the caller has set: no inference mode, float32
        and CPU for new tensors, no autocast. With `deterministic`, repeated CUDA results are bit-identical.

        Raises:
            RuntimeError: this thread is already inside the context, as in a callback of a run.
        """
        with self._turn:
            if self._taken:
                raise RuntimeError("the pipeline is running: its callbacks cannot call it again")
            self._taken = True
            default, strict = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
            torch.set_default_dtype(torch.float32)
            if deterministic and self.device.type == "cuda":
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch requires it
                torch.use_deterministic_algorithms(True)
            place = nullcontext() if torch.get_default_device() == CPU else CPU  # slows every call
            try:
                with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False), place:
                    yield
            finally:
                torch.set_default_dtype(default)
                if deterministic:
                    torch.use_deterministic_algorithms(strict)
                self._taken = False

    def stream(
        self, name: str, blocks: Sequence[nn.Module] | nn.ModuleList, num_persistent_params: int = 0
    ) -> None:
        """Stream blocks of a model, in the order in which they run, from the next stage on.

        The first ones stay on the device, with at most `num_persistent_params` parameters. All models are
        offloaded between stages. On CUDA, the streamed weights are page-locked so that copies overlap with
        computation; if that would take more than half of the free CPU memory, a thread stages the copies.
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
            copies = (SideStreamCopies if page_lock(streamed) else StagedCopies)(self.device)
        self._streams[name] = (BlockStream(streamed, self.device, copies), streamed)

    def stop_streaming(self) -> None:
        """Stop streaming: from the next stage on, models are moved whole."""
        with self._turn:
            self._streams.clear()

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Keep the named models on the compute device in this context; with offload they leave it at exit."""
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
        """Move the named models (all by default) to the CPU and free their device memory."""
        with self._turn:
            for name in set(names or self.models) - self.staying:
                for tensor, home, copy, version in self._homes.pop(name, ()):
                    # Not where the copy was replaced or changed since: by a LoRA, or by the caller.
                    if copy() is tensor.untyped_storage() and tensor._version == version:
                        tensor.data = home
                self.models[name].to("cpu")
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    @torch.inference_mode(False)  # in which tensors have no versions
    def _bring(self, name: str, but: Sequence[nn.Module] = ()) -> None:
        """Copy a model's weights to the device, except those of the blocks `but`."""
        staying = {id(tensor) for block in but for tensor in tensors_of(block)}
        homes = self._homes.setdefault(name, [])
        for tensor in tensors_of(self.models[name]):
            if id(tensor) in staying:
                continue
            home = tensor.data
            moved = copy_to(self.device, home)
            if moved is not home:
                tensor.data = moved
                # PyTorch does not own (resize) memory that is mapped from a file; to keep that costs nothing.
                if self.offload or not home.untyped_storage().resizable():
                    homes.append((tensor, home, ref(moved.untyped_storage()), tensor._version))


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on a device; the tensor itself if it is already there."""
    return tensor.to(device)


def page_lock(blocks: Sequence[nn.Module] | nn.ModuleList) -> bool:
    """Move the blocks' weights to one page-locked buffer, and return whether that was done.

    It is not if the buffer takes more than half of the free CPU memory. One for all, as each is rounded up.
    """
    tensors = [t for block in blocks for t in tensors_of(block) if not t.data.is_pinned()]
    sizes = [-(-tensor.nbytes // 64) * 64 for tensor in tensors]  # so that each is aligned
    if 2 ** (sum(sizes) - 1).bit_length() > available_memory(CPU) // 2:
        return False
    if tensors:
        for tensor, room in zip(tensors, page_locked(sum(sizes)).split(sizes), strict=True):
            tensor.data = stored(tensor.data, room)
    return True
