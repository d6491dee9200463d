"""Make docs/transfer.gif: reference, no transfer and transferred, for each of two clips, by the nano model.

python docs/make_gif.py
"""

from pathlib import Path

from PIL import Image

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.evaluation import video_grid

HERE = Path(__file__).parent
CLIPS = HERE.parent / "examples" / "data"
RUNS = {
    "bounce": ("a blue star on a yellow background", 2),
    "circle": ("a red triangle on a white background", 1),
}
HEIGHT = 150  # pixels, of each video


def main() -> None:
    pipe = WanVideoPipeline.from_pretrained("nano", device="cpu")
    videos = {}
    for name, (prompt, seed) in RUNS.items():
        reference = VideoData(CLIPS / f"{name}.mp4")
        videos[f"reference: {name}"] = reference.raw_data()
        videos["no transfer" + " " * len(videos)] = pipe(prompt, mode="No_transfer", seed=seed)
        videos["transferred" + " " * len(videos)] = pipe(prompt, input_video=reference, seed=seed)
    pages = video_grid(videos, columns=3, height=HEIGHT)
    palette = pages[len(pages) // 2].quantize(96, dither=Image.Dither.NONE)
    first, *others = (page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages)
    first.save(HERE / "transfer.gif", save_all=True, append_images=others, duration=90, loop=0, optimize=True)


if __name__ == "__main__":
    main()
