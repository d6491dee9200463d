"""Which block, heads and temperature of a checkpoint read motion best: measured on clips with known motion.

python examples/probe_motion.py --model_dir nano
"""

import argparse
import logging
from pathlib import Path

from tqdm import tqdm

from diffsynth import WanVideoPipeline
from diffsynth.evaluation.probe import SIGMAS, TAUS, probe_motion
from diffsynth.evaluation.probe_report import GUIDED_SIGMAS, suggest
from diffsynth.evaluation.probe_truth import TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_dir", default="nano", help="checkpoint folder, or nano, 1.3b, 14b")
    parser.add_argument("--output_dir", type=Path, default="results/probe")
    parser.add_argument("--clips", type=int, default=8, help="clips to draw")
    parser.add_argument("--height", type=int, help="pixels; what suits the checkpoint by default")
    parser.add_argument("--width", type=int, help="pixels; what suits the checkpoint by default")
    parser.add_argument("--num_frames", type=int, help="frames; 5 latent frames by default")
    parser.add_argument("--blocks", type=int, nargs="+", help="blocks of the DiT, all by default")
    parser.add_argument("--sigmas", type=float, nargs="+", default=SIGMAS, help="noise levels, in (0, 1]")
    parser.add_argument("--taus", type=float, nargs="+", default=TAUS, help="factors on the attention logits")
    parser.add_argument("--sf", type=int, default=4, help="frames that each latent frame is compared with")
    parser.add_argument("--tokens", choices=TOKENS, default="object", help="which tokens are compared")
    parser.add_argument(
        "--prompt", choices=("empty", "caption"), default="empty", help="what the DiT is told"
    )
    parser.add_argument("--range", type=float, nargs=2, default=GUIDED_SIGMAS, help="noise levels to rank by")
    parser.add_argument("--rows", type=int, default=20, help="rows of the table to print")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    low, high = args.range
    if not any(low <= sigma <= high for sigma in args.sigmas):
        parser.error(f"--range {low:g} {high:g} has none of --sigmas {args.sigmas}")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    pipe = WanVideoPipeline.from_pretrained(args.model_dir, device=args.device)
    result = probe_motion(
        pipe,
        clips=args.clips,
        sigmas=args.sigmas,
        taus=args.taus,
        blocks=args.blocks,
        sf=args.sf,
        tokens=args.tokens,
        prompt="" if args.prompt == "empty" else args.prompt,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        seed=args.seed,
        progress=tqdm,
    )
    paths = result.save(args.output_dir)
    print(result.table(args.rows, (low, high)))
    settings = ", ".join(f"{name}={value!r}" for name, value in suggest(result, (low, high)).items())
    print(f"best from sigma {low:g} to {high:g}: MotionGuidance({settings})")
    print(f"files: {', '.join(map(str, paths))}")


if __name__ == "__main__":
    main()
