"""One guided denoising step: ours against the released code's way of computing it, side by side in one run.

    python benchmarks/guidance_step.py [--height 480 --width 832 --frames 9 --dim 256 --layers 30 --device
    cpu]

Both compute the released maths (`MotionGuidance.released()`); ours also its default. FFE is time, or
operations, in full forwards of the same DiT. Times are medians of alternating calls; peaks are of one call
in a process of its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import released_guidance
import torch
from measure import RETURN_FREED_MEMORY, FlopCounter, peak_increase

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion import MotionGuidance, guided_step
from diffsynth.vram_management import synchronize

SIGMA = 0.9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"height": 480, "width": 832, "frames": 9, "dim": 256, "layers": 30, "repeats": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def calls(args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the contenders by name."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    dit = WanModel(
        dim=args.dim, in_dim=16, ffn_dim=args.dim * 6, out_dim=16, text_dim=256, freq_dim=256,
        num_heads=args.dim // 128, num_layers=args.layers,
    )  # fmt: skip
    dit.requires_grad_(False).to(device)
    shape = (3, 1, 16, (args.frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    latents, reference, noise = torch.randn(shape).to(device)
    context, null_context = torch.randn(2, 1, 512, 256).to(device)
    timestep = torch.tensor([1000 * SIGMA], device=device)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return dit(latents, timestep, context)

    def released() -> torch.Tensor:
        noised = (1 - SIGMA) * reference + SIGMA * noise
        return released_guidance.guided_step(dit, latents, noised, timestep, context, null_context)

    def ours(guidance: MotionGuidance) -> Callable[[], torch.Tensor]:
        return lambda: guided_step(
            dit, latents, reference=reference, noise=noise, sigma=SIGMA, timestep=timestep, context=context,
            null_context=null_context, guidance=guidance,
        )[0]  # fmt: skip

    return {
        "forward": forward,
        "released": released,
        "ours, same maths": ours(MotionGuidance.released(checkpoint="none")),
        "ours, same, block": ours(MotionGuidance.released(checkpoint="block")),
        "ours, default": ours(MotionGuidance(checkpoint="none")),
    }


def main() -> None:
    args = parse_arguments()
    device, compared = torch.device(args.device), calls(args)
    if args.peak_of:
        print(peak_increase(compared[args.peak_of], device))
        return
    print(f"{torch.__version__}, {args.device}, float32, {torch.get_num_threads()} threads; ", end="")
    print(f"{args.height}x{args.width}x{args.frames}, width {args.dim}, {args.layers} blocks")
    moved: dict[str, torch.Tensor] = {}
    flops: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(args.repeats):
        for name, call in compared.items():
            synchronize(device)
            started = time.perf_counter()
            # Counting costs microseconds an operation, the same for all.
            with FlopCounter() as counter:
                moved[name] = call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
            flops[name] = counter.total
    difference = (moved["released"] - moved["ours, same maths"]).abs()
    print(f"latents that differ by more than 1e-3: {(difference > 1e-3).float().mean():.2%}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'':<18} {'median s':>9} {'ratio':>6} {'FFE':>6} {'TFLOP':>7} {'FFE':>6}", flush=True)
    for name in compared:
        ratio, ffe = median[name] / median["released"], median[name] / median["forward"]
        work = flops[name] / flops["forward"]
        numbers = f"{median[name]:9.2f} {ratio:6.2f} {ffe:6.2f} {flops[name] / 1e12:7.3f} {work:6.2f}"
        print(f"{name:<18} {numbers}", flush=True)
    for name in compared:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        environment = os.environ | RETURN_FREED_MEMORY
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        print(f"{name:<18} peak {int(result.stdout) / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
