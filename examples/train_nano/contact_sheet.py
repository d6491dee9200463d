"""Draw what a checkpoint makes of prompts, five frames each under its prompt.

python examples/train_nano/contact_sheet.py --model models/Wan2.1-T2V-nano --output sheet.png
"""

import argparse
from pathlib import Path

from PIL import Image
from synthetic import COLOURS, SHAPES

from diffsynth import WanVideoPipeline
from diffsynth.evaluation.grid import picture_grid

SHOWN = (0, 4, 8, 12, 16)
SCALE = 2


def prompts(count: int) -> list[str]:
    """Every shape in turn, in colours that differ from the background's."""
    names = list(COLOURS)
    chosen = [
        (names[3 * i % len(names)], SHAPES[i % len(SHAPES)], names[(3 * i + 5) % len(names)])
        for i in range(count)
    ]
    return [f"a {colour} {shape} on a {background} background" for colour, shape, background in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--output", type=Path, default=Path("sheet.png"))
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = WanVideoPipeline.from_pretrained(args.model, device="cpu")
    texts, rows = prompts(args.count), []
    for prompt in texts:
        frames = pipe(prompt, seed=args.seed, progress_bar_cmd=iter)
        size = SCALE * frames[0].width, SCALE * frames[0].height
        rows.append([frames[t].resize(size, Image.Resampling.NEAREST) for t in SHOWN if t < len(frames)])
    picture_grid(rows, captions=texts).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
