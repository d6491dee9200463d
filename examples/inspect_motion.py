"""Look at the motion that a reference video would transfer: arrows over its frames, colours beside them.

python examples/inspect_motion.py REF.mp4 --model_dir models/Wan2.1-T2V-1.3B
"""

import argparse
from pathlib import Path

from arguments import parse_arguments

from diffsynth import MotionGuidance, VideoData, WanVideoPipeline
from diffsynth.cli.arguments import add_options
from diffsynth.configs.descriptors import DEFAULT_MODE, flow_modes
from diffsynth.configs.options import DEFAULT_FPS, MOTION_PREFIX, LoadOptions, RunOptions
from diffsynth.configs.resolve import motion_for
from diffsynth.evaluation import reference_flow, save_flow_video
from diffsynth.jobs.task import with_motion


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("reference", type=Path, help="the video to look at")
    parser.add_argument("--model-dir", default="models/Wan2.1-T2V-1.3B", help="checkpoint folder, or nano")
    parser.add_argument("--output", type=Path, default="motion.mp4", help="(motion.mp4)")
    parser.add_argument("--mode", choices=flow_modes(), default=DEFAULT_MODE, help=f"({DEFAULT_MODE})")
    parser.add_argument("--sigma", type=float, default=0.7, help="noise level, in (0, 1] (0.7)")
    add_options(parser, RunOptions, "the size", only=("height", "width"))
    add_options(parser, LoadOptions, "the model", only=("device",))
    add_options(parser, MotionGuidance, "motion", prefix=MOTION_PREFIX, but=("mode",))
    args = with_motion(vars(parse_arguments(parser)))
    motion = motion_for(args["model_dir"], args["mode"], **args.get("motion", {}))
    pipe = WanVideoPipeline.from_pretrained(args["model_dir"], device=args.get("device", "auto"))
    height, width = (args.get(name, pipe.defaults[name]) for name in ("height", "width"))
    video = VideoData(args["reference"], height=height, width=width)
    flow = reference_flow(pipe, video, motion=motion, sigma=args["sigma"])
    print(save_flow_video(flow, args["output"], sf=motion.sf, frames=video, fps=video.fps or DEFAULT_FPS))


if __name__ == "__main__":
    main()
