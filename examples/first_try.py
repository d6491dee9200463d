"""Motion transfer in seconds, with no download: a shipped clip moves what the embedded nano model draws.

python examples/first_try.py [--prompt "a blue star on a yellow background"] [--input_video REF.mp4]
"""

import argparse
from pathlib import Path

from diffsynth import VideoData, WanVideoPipeline, save_video
from diffsynth.cli.arguments import add_options
from diffsynth.configs.options import RunOptions
from diffsynth.evaluation.followed import beside_reference, fitted, follow_text

CLIP = Path(__file__).parent / "data" / "bounce.mp4"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input_video", type=Path, default=CLIP)
    parser.add_argument("--prompt", default="a blue star on a yellow background")
    parser.add_argument("--output_dir", type=Path, default=Path("results/first_try"))
    add_options(parser, RunOptions, "the run", only=("seed",))
    parser.set_defaults(seed=1)
    args = parser.parse_args()

    pipe = WanVideoPipeline.from_pretrained("nano", device="cpu")
    clip = VideoData(args.input_video)
    transferred = pipe(args.prompt, input_video=clip, mode="effi_AMF", seed=args.seed)
    without = pipe(args.prompt, seed=args.seed)
    out = save_video(transferred, args.output_dir / "out.mp4", fps=clip.fps, quality=8)
    videos = {"reference": fitted(clip, transferred), "no transfer": without, "transferred": transferred}
    beside = beside_reference(videos) * 3  # red: the object's path, blue: the reference's
    sheet = save_video(beside, args.output_dir / "side_by_side.mp4", fps=clip.fps, quality=8)
    print(f"transferred (64x64): {out}\nlook at: {sheet}; {follow_text(transferred, clip)}")


if __name__ == "__main__":
    main()
