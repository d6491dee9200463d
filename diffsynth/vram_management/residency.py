"""Which models are on the compute device while a stage runs."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class Residency:
    """Brings models to the compute device when a stage needs them.

    Without offload a model stays there once it came; with offload it rests on the CPU and is on the device
    only inside `using`. Models come on first use, so that a large one need not fit beside the others.
    """

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device) -> None:
        self.models = dict(models)
        self.device = device
        self.offload = False

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Inside this context the named models are on the compute device; also after an exception they go
        back.
        """
        try:
            for name in names:
                self.models[name].to(self.device)
            yield
        finally:
            if self.offload:
                self.rest(*names)

    def rest(self, *names: str) -> None:
        """Move the named models (all by default) to the CPU and hand their memory back."""
        for name in names or self.models:
            self.models[name].to("cpu")
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
