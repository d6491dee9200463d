"""Look at the motion that a reference video would transfer: arrows over its frames, colours beside them.

python examples/inspect_motion.py REF.mp4 --model_dir models/Wan2.1-T2V-1.3B
"""

import argparse
from pathlib import Path

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.evaluation import reference_flow, save_flow_video
from diffsynth.motion import MotionGuidance


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("reference", type=Path, help="the video to look at")
    parser.add_argument("--model_dir", default="models/Wan2.1-T2V-1.3B", help="checkpoint folder")
    parser.add_argument("--output", type=Path, help="REF-motion.mp4 by default")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=832, help="pixels")
    parser.add_argument("--mode", choices=("effi_AMF", "AMF"), default="effi_AMF")
    parser.add_argument("--sf", type=int, default=4, help="frames that each latent frame is compared with")
    parser.add_argument("--tau", type=float, default=1.0, help="factor on the attention logits")
    parser.add_argument(
        "--sigma", type=float, default=0.7, help="noise level at which the DiT looks, in (0, 1]"
    )
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    video = VideoData(args.reference, height=args.height, width=args.width)
    pipe = WanVideoPipeline.from_pretrained(args.model_dir, device=args.device)
    motion = MotionGuidance(mode=args.mode, sf=args.sf, tau=args.tau)
    flow = reference_flow(pipe, video, motion=motion, sigma=args.sigma)
    output = args.output or Path(f"{args.reference.stem}-motion.mp4")
    path = save_flow_video(flow, output, sf=args.sf, frames=video, fps=video.fps or 15)
    print(f"{path}: flow of {len(flow)} pairs of latent frames, {flow.shape[1]}x{flow.shape[2]} tokens")


if __name__ == "__main__":
    main()
