"""What a run cost: seconds, DiT block calls, gradient evaluations, peak memory; kept as one JSON line a
run.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.vram_management import peak_memory, reset_peak_memory, synchronize


@dataclass(slots=True)
class RunCost:
    """Cost of one denoising run. Field names `seed`, `time_guidance` and `time_gen` are those of the
    released code.

    time_guidance: seconds of each guided step's guidance; losses: of its fresh gradients. stage_seconds: of
    the stages before and after. time_gen: seconds of the whole denoising, guidance
    included. peak_memory: bytes allocated on an accelerator, or the process's largest resident size on a CPU.
    """

    seed: int
    mode: str
    num_inference_steps: int
    time_guidance: list[float] = field(default_factory=list)
    time_gen: float = 0.0
    gradient_evaluations: int = 0
    dit_block_calls: int = 0
    peak_memory: int = 0
    losses: list[tuple[float, ...]] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)

    def state(self) -> dict[str, object]:
        """All fields, as plain numbers and text that later steps do not change."""
        return asdict(self)

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on counting from a `state`, also one that went through JSON."""
        for item in fields(self):
            setattr(self, item.name, state[item.name])
        self.losses = [tuple(losses) for losses in self.losses]

    def append_to(self, folder: str | Path) -> None:
        """Add this run as a line to `latency.jsonl` in a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "latency.jsonl").open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")


@contextmanager
def measured(cost: RunCost, dit: WanModel, device: torch.device) -> Iterator[RunCost]:
    """Fill in time, block calls and peak memory of what runs inside this context."""

    def count(*_: object) -> None:
        cost.dit_block_calls += 1

    hooks = [block.register_forward_hook(count) for block in dit.blocks]
    reset_peak_memory(device)
    started = time.perf_counter()
    try:
        yield cost
    finally:
        synchronize(device)
        cost.time_gen += time.perf_counter() - started
        cost.peak_memory = peak_memory(device)
        for hook in hooks:
            hook.remove()
