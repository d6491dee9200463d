"""One DiT forward: ours against diffusers' WanTransformer3DModel, the same weights, side by side in one run.

    pip install diffusers && python benchmarks/dit_forward.py [--frames 17 --dim 256 --layers 4 --device cpu]

Times are medians of alternating calls; peaks are of one call in a process of its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from measure import RETURN_FREED_MEMORY, count_flops, peak_increase
from torch import nn

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_keys import official_key
from diffsynth.vram_management import synchronize

MODELS = ("ours", "diffusers")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"height": 480, "width": 832, "frames": 17, "dim": 256, "layers": 4, "repeats": 5}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peak-of", choices=MODELS, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str, args: argparse.Namespace) -> nn.Module:
    """Either model with the weights of a seeded one of ours."""
    torch.manual_seed(0)
    ours = WanModel(
        dim=args.dim, in_dim=16, ffn_dim=args.dim * 6, out_dim=16, text_dim=256, freq_dim=256,
        num_heads=args.dim // 128, num_layers=args.layers,
    )  # fmt: skip
    model = ours
    if name == "diffusers":
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel(
            num_attention_heads=args.dim // 128, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=256, freq_dim=256, ffn_dim=args.dim * 6, num_layers=args.layers,
        )  # fmt: skip
        weights = ours.state_dict()
        model.load_state_dict({key: weights[official_key(key)] for key in model.state_dict()})
    if args.dtype != "float32":
        model = model.to(getattr(torch, args.dtype))
    return model.to(args.device).eval().requires_grad_(False)


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    latent_frames = (args.frames - 1) // 4 + 1
    x = torch.randn(1, 16, latent_frames, args.height // 8, args.width // 8)
    context = torch.randn(1, 512, 256)
    dtype = getattr(torch, args.dtype)
    return x.to(args.device, dtype), torch.tensor([500.0], device=args.device), context.to(args.device, dtype)


def run(name: str, model: nn.Module, arguments: tuple) -> torch.Tensor:
    return model(*arguments) if name == "ours" else model(*arguments, return_dict=False)[0]


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    device, arguments = torch.device(args.device), inputs(args)
    if args.peak_of:
        model = build(args.peak_of, args)
        print(peak_increase(lambda: run(args.peak_of, model, arguments), device))
        return
    models = {name: build(name, args) for name in MODELS}
    outputs = {name: run(name, model, arguments) for name, model in models.items()}
    difference = (outputs["ours"] - outputs["diffusers"]).abs().max().item()
    print(f"{torch.__version__}, {args.device}, {args.dtype}, {torch.get_num_threads()} threads; ", end="")
    print(f"{args.height}x{args.width}x{args.frames}, width {args.dim}, {args.layers} blocks")
    print(f"largest difference of the velocities: {difference:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in MODELS}
    for _ in range(args.repeats):
        for name, model in models.items():
            synchronize(device)
            started = time.perf_counter()
            run(name, model, arguments)
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    print(f"{'model':<10} {'median s':>9} {'ratio':>6} {'TFLOP':>7} {'peak MB':>8}")
    for name, model in models.items():
        flops = count_flops(lambda name=name, model=model: run(name, model, arguments))
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        environment = os.environ | RETURN_FREED_MEMORY
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peak = int(result.stdout)
        median = statistics.median(seconds[name])
        ratio = median / statistics.median(seconds["diffusers"])
        print(f"{name:<10} {median:9.2f} {ratio:6.2f} {flops / 1e12:7.3f} {peak / 1e6:8.0f}")


if __name__ == "__main__":
    main()
