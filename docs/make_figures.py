"""Draw the figures of docs/how_it_works.md: the flow that the nano model reads, noise levels, a run's losses.

fastvmt transfer examples/data/bounce.mp4 --prompt "a blue star on a yellow background" --seed 1 -o out.mp4
python docs/make_figures.py out.mp4.json
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.configs.resolve import motion_for
from diffsynth.evaluation import flow_to_image, reference_flow
from diffsynth.evaluation.drawing import INK, PAPER, Sketch, draw_arrow, over, text_font
from diffsynth.evaluation.plot import BLUE, GREEN, RED, Plot, loss_curves
from diffsynth.motion import frame_pairs
from diffsynth.motion.coarse import noise_scale
from diffsynth.runs.record import read_record
from diffsynth.schedulers.flow_match import flow_match_sigmas

HERE = Path(__file__).parent
CLIP = HERE.parent / "examples" / "data" / "bounce.mp4"
CELL, GAP, LEFT, TOP = 150, 6, 110, 26  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="of a run of the nano model with guidance")
    losses = read_record(parser.parse_args().record).cost["losses"]
    flow_picture().save(HERE / "flow_levels.png", optimize=True)
    schedule_picture().save(HERE / "schedule.png", optimize=True)
    loss_curves(losses).save(HERE / "losses.png", optimize=True)


def flow_picture(sigmas: tuple[float, ...] = (0.95, 0.85, 0.7, 0.5)) -> Image.Image:
    """The reference's latent frames, and the flow to the next one as read at noise levels."""
    pipe = WanVideoPipeline.from_pretrained("nano", device="cpu")
    motion = motion_for("nano")
    video = VideoData(CLIP, height=64, width=64)
    rows: list[tuple[str, list[Image.Image]]] = []
    steps = range(4)
    rows.append(("reference", [_cell(video[4 * step]) for step in steps]))
    for sigma in sigmas:
        flow = reference_flow(pipe, video, motion=motion, sigma=sigma)
        to_next = [frame_pairs(5, motion.sf).index((step, step + 1)) for step in steps]
        rows.append((f"sigma {sigma:g}", [_flow_cell(flow[pair]) for pair in to_next]))
    size = (LEFT + len(steps) * (CELL + GAP), TOP + len(rows) * (CELL + GAP))
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for column in steps:
        text = f"latent frame {column} to {column + 1}"
        draw.text((LEFT + column * (CELL + GAP), 6), text, fill=INK, font=text_font(13))
    for row, (label, cells) in enumerate(rows):
        top = TOP + row * (CELL + GAP)
        draw.text((8, top + CELL / 2), label, fill=INK, font=text_font(14), anchor="lm")
        for column, cell in enumerate(cells):
            picture.paste(cell, (LEFT + column * (CELL + GAP), top))
    return picture


def _cell(frame: Image.Image) -> Image.Image:
    return frame.resize((CELL, CELL), Image.Resampling.BICUBIC)


def _flow_cell(flow: torch.Tensor, largest: float = 2.0) -> Image.Image:
    """Colours and arrows of a flow [H, W, 2]; `largest`, in tokens, has full colour."""
    colours = flow_to_image(flow, largest).resize((CELL, CELL), Image.Resampling.NEAREST)
    sketch = Sketch((CELL, CELL))
    token = CELL / flow.shape[0]
    for row, col in np.ndindex(*flow.shape[:2]):
        x, y = (col + 0.5) * token, (row + 0.5) * token
        drow, dcol = (flow[row, col] * token).tolist()
        draw_arrow(sketch, (x, y), (x + dcol, y + drow), (30, 30, 30, 220), 1.6)
    return over(colours, sketch.layer())


def schedule_picture() -> Image.Image:
    """Noise level of each step, guided ones as filled dots: published numbers, and the nano model's."""
    published = flow_match_sigmas(50, 0.75, 7.0).tolist()
    nano = flow_match_sigmas(25, 1.0, 3.0).tolist()
    coarse = [sigma * noise_scale(sigma, 2) for sigma in published[:10]]
    plot = Plot((0.0, 50.0), (0.0, 1.0), "denoising step", "noise level")
    plot.curve(list(enumerate(published)), BLUE, filled=10)
    plot.curve(list(enumerate(nano)), RED, filled=18)
    plot.curve(list(enumerate(coarse)), GREEN, filled=0)
    plot.text((27, 0.93), "50 steps, strength 0.75, shift 7; the first 10 guided", BLUE)
    plot.text((27, 0.86), "nano: 25 steps, strength 1, shift 3; the first 18 guided", RED)
    plot.text((27, 0.79), "what coarse guidance over 2x2 looks at, for the first", GREEN)
    return plot.picture


if __name__ == "__main__":
    main()
