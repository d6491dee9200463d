"""Cost of a run: seconds, DiT block calls, gradient evaluations, peak memory."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from diffsynth.data.files import writable_folder
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import OptimizationRecord
from diffsynth.vram_management import memory_peaks, peak_memory, reset_peak_memory, synchronize

logger = logging.getLogger(__name__)


@dataclass(slots=True, repr=False)
class RunCost:
    """Cost of one denoising run; `seed`, `time_guidance` and `time_gen` are named as in the released code.

    Attributes:
        seed, mode, num_inference_steps: those of the run.
        time_guidance: seconds of each guided step's guidance.
        time_gen: seconds of the whole denoising, guidance included.
        gradient_evaluations, dit_block_calls: counts over the run.
        peak_memory: bytes allocated on an accelerator, or the process's largest resident size on a CPU.
        losses: for each guided step, the loss at each newly computed (not reused) gradient.
        stage_seconds: seconds of the stages before and after denoising, by name.
        stage_memory: bytes of a CUDA device in these stages and in denoising, by name: peak allocated, peak
            reserved, and in use at its end, other programs included.
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
    stage_memory: dict[str, dict[str, int]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return a table."""
        seconds = self.stage_seconds | {"denoising": self.time_gen}
        rows = [f"{name:<14}{seconds[name]:8.1f} s" for name in sorted(seconds, key="decode".__eq__)]
        return "\n".join([
            f"RunCost: {self.mode}, {self.num_inference_steps} steps, seed {self.seed}", *rows,
            f"{'guidance':<14}{sum(self.time_guidance):8.1f} s of the denoising: {self.gradient_evaluations} "
            f"gradients in {len(self.time_guidance)} steps",
            f"{'peak memory':<14}{self.peak_memory / 2**30:8.2f} GB",
        ])  # fmt: skip

    def add_guidance(self, seconds: float, record: OptimizationRecord) -> None:
        """Count a guided step and log its losses.

        Args:
            seconds: duration of its guidance.
            record: record of its inner loop.
        """
        self.time_guidance.append(seconds)
        self.gradient_evaluations += record.gradient_evaluations
        self.losses.append(record.losses)
        losses = " -> ".join(f"{loss:.4g}" for loss in record.losses)
        found = f"loss {losses}" if losses else "reused the gradients of an earlier step"
        logger.info("guided step %d: %s", len(self.time_guidance), found)

    def state(self) -> dict[str, object]:
        """Return copies of all fields, as plain numbers and text."""
        return asdict(self)

    def restore(self, state: Mapping[str, object]) -> None:
        """Set all fields to those of a `state`, which may have been stored as JSON."""
        for item in fields(self):
            setattr(self, item.name, state.get(item.name, getattr(self, item.name)))
        self.losses = [tuple(losses) for losses in self.losses]

    def append_to(self, path: Path) -> None:
        """Append this cost as a JSON line to a file."""
        with path.open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")


def latency_file(folder: str | Path | None) -> Path:
    """Return the file of costs in latency_dir, which is made if it is missing."""
    if folder is None:
        raise ValueError("test_latency needs latency_dir, the folder of latency.jsonl")
    path = writable_folder("latency_dir", folder) / "latency.jsonl"
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"latency_dir {folder} cannot be written to: {error}") from error
    return path


@contextmanager
def measured(cost: RunCost, dit: WanModel, device: torch.device) -> Iterator[Callable[[], float]]:
    """Add time, block calls and peak memory of what runs inside this context to `cost`.

    Yields a function that returns the seconds so far, including those of earlier contexts.
    """

    def count(*_: object) -> None:
        cost.dit_block_calls += 1

    hooks = [block.register_forward_hook(count) for block in dit.blocks]
    reset_peak_memory(device)
    started = time.perf_counter()
    try:
        yield lambda: cost.time_gen + time.perf_counter() - started
    finally:
        synchronize(device)
        cost.time_gen += time.perf_counter() - started
        cost.peak_memory = max(cost.peak_memory, peak_memory(device))
        before, peaks = cost.stage_memory.get("denoising", {}), memory_peaks(device)
        cost.stage_memory["denoising"] = {n: max(v, before.get(n, 0)) for n, v in peaks.items()}
        for hook in hooks:
            hook.remove()
