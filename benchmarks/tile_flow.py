"""Motion flow forward and backward: tile, dense and a plain loop over pairs, side by side in one run.

    python benchmarks/tile_flow.py [--frames 21 --rows 30 --cols 52 --width 128 --sf 4 --device cpu]

The loop gathers the keys of all windows of a pair from an expanded view and keeps them for the backward pass.
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

from diffsynth.motion import attention_motion_flow, frame_pairs, tile_motion_flow
from diffsynth.motion.flow import token_positions
from diffsynth.motion.tile_flow import find_windows, from_tiles, to_tiles
from diffsynth.vram_management import synchronize

METHODS = ("tile", "tile, windows given", "dense", "loop")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"frames": 21, "rows": 30, "cols": 52, "width": 128, "sf": 4, "window": 21, "chunk": 4}
    for name, default in {**defaults, "repeats": 5, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tile", type=int, nargs=2, default=(3, 4))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip", nargs="*", default=(), choices=METHODS)
    parser.add_argument("--peak-of", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args()


def features(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shape = (2, args.frames, args.rows, args.cols, args.width)
    return tuple(x.requires_grad_() for x in torch.randn(shape, device=args.device))


def loop_flow(q: torch.Tensor, k: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Tile flow written down plainly, one pair at a time -> [P, H, W, 2]."""
    grid, tile = (args.rows, args.cols), tuple(args.tile)
    sides = (min(args.window, args.rows), min(args.window, args.cols))
    own, tokens = token_positions(*grid, q), args.rows * args.cols
    queries, num_keys = to_tiles(q, tile), sides[0] * sides[1]
    flows = []
    for i, j in frame_pairs(len(q), args.sf):
        if i == j:
            logits = q[i].flatten(0, 1) @ k[j].flatten(0, 1).T * args.width**-0.5
            flows.append((logits.softmax(-1) @ own - own).unflatten(0, grid))
            continue
        first = find_windows(q, k, [(i, j)], tile, sides, 1.0, 1)[0]
        rows = first[:, :1] + torch.arange(sides[0], device=q.device)
        cols = first[:, 1:] + torch.arange(sides[1], device=q.device)
        index = (rows[:, :, None] * args.cols + cols[:, None, :]).flatten(1)
        view = k[j].flatten(0, 1)[:, :, None].expand(tokens, args.width, num_keys)
        keys = view.gather(0, index[:, None].expand(-1, args.width, -1))
        attention = (queries[i] @ keys * args.width**-0.5).softmax(-1)
        expected = from_tiles((attention @ own[index])[None], tile, grid)[0]
        flows.append(expected - own.unflatten(0, grid))
    return torch.stack(flows)


def run(method: str, q: torch.Tensor, k: torch.Tensor, args: argparse.Namespace, windows: torch.Tensor):
    """Flow [P, H, W, 2] and the gradients of a loss on it."""
    options = {"sf": args.sf, "chunk": args.chunk}
    if method == "dense":
        flow = attention_motion_flow(q, k, **options)
    elif method == "loop":
        flow = loop_flow(q, k, args)
    else:
        given = windows if method == "tile, windows given" else None
        flow = tile_motion_flow(
            q, k, window=args.window, tile=tuple(args.tile), windows=given, **options
        ).flow
    return flow.detach(), torch.autograd.grad(flow.square().mean(), (q, k))


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    q, k = features(args)
    with torch.no_grad():
        tiled = tile_motion_flow(
            q, k, sf=args.sf, window=args.window, tile=tuple(args.tile), chunk=args.chunk
        )
    if args.peak_of:
        print(peak_increase(lambda: run(args.peak_of, q, k, args, tiled.windows), device))
        return
    methods = [method for method in METHODS if method not in args.skip]
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(args.repeats):
        for method in methods:
            synchronize(device)
            started = time.perf_counter()
            run(method, q, k, args, tiled.windows)
            synchronize(device)
            seconds[method].append(time.perf_counter() - started)
    print(
        f"{torch.__version__}, {args.device}, {torch.get_num_threads()} threads; {args.frames} frames of ",
        end="",
    )
    print(f"{args.rows}x{args.cols} tokens, width {args.width}, sf {args.sf}, window {args.window}")
    if "loop" in methods:
        one, other = (run(method, q, k, args, tiled.windows) for method in ("tile", "loop"))
        difference = max((a - b).abs().max().item() for a, b in zip(one[1], other[1], strict=True))
        scale = max(a.abs().max().item() for a in one[1])
        print(f"tile - loop: flow {(one[0] - other[0]).abs().max():.1e}, gradient {difference / scale:.1e}")
    print(f"{'method':<20} {'median s':>9} {'ratio':>6} {'TFLOP':>7} {'peak MB':>8}")
    for method in methods:
        flops = count_flops(lambda method=method: run(method, q, k, args, tiled.windows))
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", method]
        environment = os.environ | RETURN_FREED_MEMORY
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peak = int(result.stdout)
        median = statistics.median(seconds[method])
        ratio = median / statistics.median(seconds["tile"])
        print(f"{method:<20} {median:9.2f} {ratio:6.2f} {flops / 1e12:7.3f} {peak / 1e6:8.0f}")


if __name__ == "__main__":
    main()
