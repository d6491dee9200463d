"""Peak memory of decoding with the VAE, by the number of frames: it should not grow with them.

    python benchmarks/vae_decode_memory.py [--frames 17 49 81 --height 480 --width 240 --dim 16 --device cpu]

Each length is decoded chunk by chunk, in a process of its own; the peak is over what the model takes. The
default picture is so tall that PyTorch uses the same convolution kernels for every chunk, as at full size.
On a CPU, freed memory is made to go back to the system at once: as it comes, the allocator of glibc keeps
part of it, which adds to the peak for some ten chunks before it levels off.
"""

import argparse
import os
import subprocess
import sys
import time

import torch
from measure import MIB, RETURN_FREED_MEMORY, peak_increase

from diffsynth.models.wan_video_vae import WanVideoVAE


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 49, 81])
    for name, default in {"height": 480, "width": 240, "dim": 16, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Print the peak in bytes and the seconds of one decode, counting frames so that none is kept."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    vae = WanVideoVAE(dim=args.dim).to(args.device, getattr(torch, args.dtype))
    (num_frames,) = args.frames
    num_latents = (num_frames - 1) // vae.temporal_factor + 1
    size = (n // vae.spatial_factor for n in (args.height, args.width))
    latents = torch.randn(1, vae.z_dim, num_latents, *size)
    decoded = 0

    def decode() -> None:
        nonlocal decoded
        for chunk in vae.decode_chunks(latents):
            decoded += chunk.shape[2]

    started = time.perf_counter()
    peak = peak_increase(decode, vae.device)
    if decoded != num_frames:
        raise SystemExit(f"--frames must be multiples of {vae.temporal_factor} plus 1; got {num_frames}")
    print(peak, time.perf_counter() - started)


def main() -> None:
    args = parse_arguments()
    if args.one:
        measure(args)
        return
    print(
        f"{args.height} x {args.width}, dim {args.dim}, {args.dtype}, {args.device}, {args.threads} thread(s)"
    )
    print(f"{'frames':>8}{'peak MiB':>12}{'against first':>16}{'seconds':>10}")
    first = None
    for num_frames in args.frames:
        command = [sys.executable, *sys.argv, "--one", "--frames", str(num_frames)]
        env = RETURN_FREED_MEMORY | os.environ
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout
        peak, seconds = (float(n) for n in output.split())
        first = first or peak
        print(f"{num_frames:>8}{peak / MIB:>12.1f}{peak / first:>16.3f}{seconds:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
