"""Whole guided runs side by side: the released procedure, FlowMotion, our presets, no transfer, diffusers.

    python benchmarks/run.py --device cpu --suite quick             # width 256, 30 blocks, 480x832x9
    python benchmarks/run.py --device cuda --suite full             # 1.3B, random weights, 480x832x81
    python benchmarks/run.py --suite count --model-size 14b         # operations alone, on any machine

A run is made of a few kinds of work (a DiT forward, a guided step), and every step of one kind costs the
same. Each kind is measured on its own, kinds in turn in every repeat; a run's figures are how often it needs
each, times the medians. FFE: operations, or time, in full forwards of the DiT. Skipped steps and the
scheduler cost nothing to speak of. Writes a table and, with --json, all numbers.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from contenders import SIZES, Contender, Work, contenders
from measure import RETURN_FREED_MEMORY, count_flops, peak_increase
from scaling import scaling_rows
from torch import Tensor
from tqdm import tqdm

from diffsynth.configs.fields import options_of
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.planning.memory import guided_pass_bytes
from diffsynth.planning.settings import KEEPING
from diffsynth.planning.sizes import DiTSize
from diffsynth.vram_management import available_memory, choose_device, synchronize

CHECKPOINTS = options_of(MotionGuidance)["checkpoint"][0].kind.known
FILL = 0.9  # share of free memory that a gradient may take
# Suite: model size, frames of video, repeats.
SUITES = {"quick": ("small", 9, 1), "full": ("1.3b", 81, 2), "count": ("1.3b", 81, 0)}


@dataclass(slots=True)
class Kind:
    """A kind of work: operations, seconds of each repeat, and peak bytes above what rests in memory."""

    flops: int = 0
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    failed: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--model-size", choices=SIZES, help="of the suite by default")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="auto", help="of our guidance")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size, frames, repeats = SUITES[args.suite]
    args.model_size = args.model_size or size
    args.frames = args.frames or frames
    args.repeats = repeats if args.repeats is None else args.repeats
    return args


def main() -> None:
    args = parse_arguments()
    device = torch.device("meta") if args.suite == "count" else choose_device(args.device)
    latent_shape = ((args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    work = Work(args.model_size, latent_shape, device)
    checkpoint = chosen_checkpoint(args.checkpoint, work, latent_shape)
    runs = contenders(work, checkpoint, peers=_has_diffusers() and device.type != "meta")
    calls = {kind: work.calls()[kind] for kind in dict.fromkeys(kind for run in runs for kind in run.work)}
    if args.peak_of:
        print(peak_increase(calls[args.peak_of], device))
        return
    kinds = {kind: Kind() for kind in calls}
    matmul = 0.0
    if device.type == "meta":
        for kind, call in tqdm(calls.items()):
            kinds[kind].flops = count_flops(call)
    else:
        matmul = matmul_rate(device, work.dit.dtype)
        measure(kinds, calls, args.repeats, device)
    rows = [run_row(run, kinds, matmul) for run in runs if not any(kinds[kind].failed for kind in run.work)]
    where = f"{torch.__version__}, {describe(device)}, {work.dit.dtype}, checkpoint={checkpoint}"
    print(f"{where}; {args.model_size}, {args.height}x{args.width}x{args.frames}")
    if matmul:
        print(f"matrix products: {matmul / 1e12:.2f} TFLOP/s")
    print_rows(rows)
    scaling = scaling_rows(args.model_size, (args.height // 8, args.width // 8))
    print_rows(scaling)
    if args.json:
        measured = {name: vars_of(kind) for name, kind in kinds.items()}
        document = {"where": where, "runs": rows, "kinds": measured, "scaling": scaling}
        args.json.write_text(json.dumps(document, indent=1))


def vars_of(kind: Kind) -> dict:
    return {"flops": kind.flops, "seconds": kind.seconds, "peak": kind.peak, "failed": kind.failed}


def chosen_checkpoint(checkpoint: str, work: Work, latent_shape: tuple[int, int, int]) -> str:
    """Return which activations guidance keeps: with "auto", the most that fits into free memory."""
    device, size, motion = work.latents.device, DiTSize.of(work.dit), MotionGuidance()
    if checkpoint != "auto" or device.type == "meta" or not available_memory(device):
        return "none" if checkpoint == "auto" else checkpoint
    free = FILL * available_memory(device)
    kept = [k for k in KEEPING if guided_pass_bytes(size, latent_shape, motion, k) <= free]
    return kept[0] if kept else KEEPING[-1]


def describe(device: torch.device) -> str:
    """The device, and on a CUDA one what its clocks and kernels depend on."""
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    told = "driver unknown"
    if shutil.which(query[0]):
        lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
        told = lines[device.index or 0] if lines else told
    memory = f"{found.total_memory / 2**30:.1f} GiB"
    return f"{found.name}, {memory}, {told}, cuDNN {torch.backends.cudnn.version()}"


def _has_diffusers() -> bool:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


def measure(
    kinds: dict[str, Kind], calls: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device
) -> None:
    """Operations and peak of each kind, then its seconds: kinds in turn, so that all meet the same mood."""
    for kind, call in calls.items():
        if device.type == "cpu":
            # Once, counted: counting costs microseconds an operation.
            started = time.perf_counter()
            kinds[kind].flops = count_flops(call)
            kinds[kind].seconds.append(time.perf_counter() - started)
            command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", kind]
            environment = os.environ | RETURN_FREED_MEMORY
            result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            kinds[kind].peak = int(result.stdout.split()[-1])
        else:
            try:
                kinds[kind].flops = count_flops(call)
                kinds[kind].peak = peak_increase(call, device)
            except (RuntimeError, MemoryError) as error:  # the other kinds' numbers are worth having
                kinds[kind].failed = str(error).strip().splitlines()[0]
                print(f"{kind} failed: {kinds[kind].failed}", file=sys.stderr)
    for _ in range(repeats):
        for kind, call in calls.items():
            if kinds[kind].failed:
                continue
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            kinds[kind].seconds.append(time.perf_counter() - started)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, the best of five."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def run_row(run: Contender, kinds: dict[str, Kind], matmul: float) -> dict[str, object]:
    """A whole run's figures; times are missing where only operations were counted."""
    flops = sum(count * kinds[kind].flops for kind, count in run.work.items())
    row: dict[str, object] = {"run": run.name, "TFLOP": flops / 1e12, "FFE": flops / kinds["forward"].flops}
    if not matmul:
        return row
    seconds = sum(count * kinds[kind].median for kind, count in run.work.items())
    return {
        **row,
        "seconds": seconds,
        "FFE by time": seconds / kinds["forward"].median,
        "TFLOP/s": flops / seconds / 1e12,
        "of matmul": flops / seconds / matmul,
        "peak MB": max(kinds[kind].peak for kind in run.work) / 1e6,
    }


def print_rows(rows: Sequence[dict[str, object]]) -> None:
    """A Markdown table; the first row is what the others' TFLOP and seconds are compared with."""
    base = rows[0]
    columns = list(base)
    compared = [name for name in ("TFLOP", "seconds") if name in columns and "run" in columns]
    print("\n| " + " | ".join(columns + [f"{name}, ratio" for name in compared]) + " |")
    print("|" + " --- |" * (len(columns) + len(compared)))
    for row in rows:
        cells = [value if isinstance(value, str) else f"{value:.4g}" for value in row.values()]
        ratios = [f"{row[name] / base[name]:.2f}" for name in compared]
        print("| " + " | ".join(cells + ratios) + " |")


if __name__ == "__main__":
    main()
