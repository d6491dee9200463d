"""What the example scripts share: command line, one generation, one video file."""

import argparse
import logging
from pathlib import Path

from diffsynth.cli.outputs import reserve_name

from diffsynth import VideoData, WanVideoPipeline, save_video
from diffsynth.configs.descriptors import DEFAULT_MODE, NO_TRANSFER
from diffsynth.configs.options import MODES
from diffsynth.schedulers import SAMPLERS

NEGATIVE_PROMPT = (
    "oversaturated, overexposed, static, blurred details, subtitles, painting, still picture, grey, "
    "worst quality, low quality, JPEG artifacts, ugly, deformed, extra fingers, badly drawn hands, "
    "badly drawn face, fused fingers, motionless, cluttered background, three legs, "
    "crowd in the background, walking backwards"
)


def parse_arguments(default_model_dir: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--model_dir", default=default_model_dir, help="checkpoint folder, official or diffusers layout"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("results"), help="folder for the video")
    parser.add_argument("--input_video", help="reference video; without one, text to video")
    parser.add_argument("--prompt", default="A red fox runs through fresh snow in a forest, morning light.")
    parser.add_argument("--negative_prompt", default=NEGATIVE_PROMPT)
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=832, help="pixels")
    parser.add_argument("--num_frames", type=int, help="the reference's, or 81, by default")
    parser.add_argument("--mode", choices=MODES, help="effi_AMF with a reference by default")
    parser.add_argument("--sf", type=int, help="frames that each latent frame is compared with (4)")
    parser.add_argument(
        "--denoising_strength", type=float, help="how far the reference is noised, in (0, 1]; 0.75"
    )
    parser.add_argument("--cfg_scale", type=float, default=5.8, help="weight of the prompt")
    parser.add_argument("--sigma_shift", type=float, default=7.0, help="of the noise schedule")
    parser.add_argument("--sampler", choices=SAMPLERS, default="euler")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--offload", action="store_true", help="keep models on the CPU between their stages")
    parser.add_argument("--test_latency", action="store_true", help="append what the run cost to latency_dir")
    parser.add_argument("--latency_dir", type=Path, help="folder of latency.jsonl (output_dir by default)")
    return parser.parse_args()


def main(default_model_dir: str) -> None:
    args = parse_arguments(default_model_dir)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    video = None
    if args.input_video is not None:
        video = VideoData(args.input_video, height=args.height, width=args.width)
    mode = args.mode or (NO_TRANSFER if video is None else DEFAULT_MODE)
    pipe = WanVideoPipeline.from_pretrained(args.model_dir, device=args.device)
    if args.offload:
        pipe.enable_cpu_offload()
    frames = pipe(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        input_video=video,
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        num_inference_steps=args.num_inference_steps,
        denoising_strength=args.denoising_strength,
        cfg_scale=args.cfg_scale,
        sigma_shift=args.sigma_shift,
        sampler=args.sampler,
        seed=args.seed,
        mode=mode,
        sf=args.sf,
        test_latency=args.test_latency,
        latency_dir=args.latency_dir or args.output_dir,
    )
    stem = Path(args.input_video).stem if video else "text"
    fps = (video.fps if video else None) or 15
    path = reserve_name(args.output_dir, f"{stem}-{mode}-seed{args.seed}")
    try:
        save_video(frames, path, fps=fps, quality=5)
    except BaseException:
        path.unlink()
        raise
    print(f"{path}: {len(frames)} frames of {frames[0].width}x{frames[0].height} at {fps:g} frames a second")
