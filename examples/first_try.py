"""The whole path in a minute, with no download: writes a tiny random checkpoint and a clip, makes a video.

python examples/first_try.py
"""

import logging
from pathlib import Path

from diffsynth import VideoData, WanVideoPipeline, save_video
from diffsynth.testing import write_checkpoint, write_clip

FOLDER = Path("results/first_try")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    checkpoint = FOLDER / "checkpoint"
    if not (checkpoint / "config.json").exists():
        write_checkpoint(checkpoint)
    clip = VideoData(write_clip(FOLDER / "reference.mp4"))
    pipe = WanVideoPipeline.from_pretrained(checkpoint)
    frames = pipe("a yellow square on a dark background", input_video=clip, num_inference_steps=10, seed=42)
    path = save_video(frames, FOLDER / "result.mp4", fps=clip.fps)
    print(f"{path}: {len(frames)} frames of {frames[0].width}x{frames[0].height}")
    print("Its weights are random, so it shows noise; examples/download_model.py fetches real ones.")


if __name__ == "__main__":
    main()
