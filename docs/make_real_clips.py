"""Make the sheet of real clips as references: what the embedded picture model makes of a fox, failures too.

python -m docs.make_real_clips FOLDER [--model nano-ti2v] [--output docs/real_clips.png]

FOLDER has the clips, which are not part of the repository. A row is a clip: frames of the reference as the
model sees it, then of the video that begins with examples/data/fox.png. What is logged of a reference stands
above its row. Run it again with other weights.
"""

import argparse
import logging
from pathlib import Path

from PIL import Image

from benchmarks.quality.contact_sheet import contact_sheet
from diffsynth import VideoData, WanVideoPipeline
from diffsynth.evaluation.followed import fitted

ROOT = Path(__file__).parent.parent
TITLES = ("reference", "fox.png moved by it")
RUN = {"cfg_scale": 1.0, "progress_bar_cmd": None}  # with a picture guidance needs no text
COLOURS = 128  # of the sheet, which keeps it below 400 kB


class Told(logging.Handler):
    """Collects warnings that are about the reference."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage().split(";")[0].split(":")[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="nano-ti2v")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "real_clips.png")
    args = parser.parse_args()
    pipe = WanVideoPipeline.from_pretrained(args.model, device="cpu")
    picture = Image.open(ROOT / "examples" / "data" / "fox.png")
    told = Told()
    logging.getLogger("diffsynth.planning.reference").addHandler(told)
    rows, captions = [], []
    for clip in sorted(args.folder.glob("*.mp4")):
        told.texts = []
        made = pipe("a fox", input_video=VideoData(clip), input_image=picture, seed=args.seed, **RUN)
        rows.append((fitted(VideoData(clip), made), made))
        captions.append(f"{clip.stem}: {'; '.join(told.texts) or 'nothing is told'}")
        print(captions[-1], flush=True)
    sheet = contact_sheet(rows, captions, TITLES)
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(args.output, optimize=True)
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
