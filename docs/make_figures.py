"""Draw the figures of docs/how_it_works.md: the flow that the nano model reads, noise levels, a run's losses.

fastvmt transfer examples/data/bounce.mp4 --prompt "a blue star on a yellow background" --seed 1 -o out.mp4
python docs/make_figures.py out.mp4.json
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.configs.resolve import motion_for
from diffsynth.evaluation import draw_trajectories, reference_flow, track_object
from diffsynth.evaluation.figures import BLUE, GREEN, RED, loss_curves, new_figure
from diffsynth.evaluation.flow_images import colour_panels, known_tokens, neighbour_flow
from diffsynth.evaluation.grid import picture_grid
from diffsynth.motion.coarse import noise_scale
from diffsynth.runs.record import read_record
from diffsynth.schedulers.flow_match import flow_match_sigmas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
CLIP = HERE.parent / "examples" / "data" / "bounce.mp4"
CELL = 200  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="of a run of the nano model with guidance")
    losses = read_record(parser.parse_args().record).cost["losses"]
    flow_picture().save(HERE / "flow_levels.png", optimize=True)
    schedule_figure().savefig(HERE / "schedule.png")
    loss_curves(losses).savefig(HERE / "losses.png")


def flow_picture(sigmas: tuple[float, ...] = (0.95, 0.85, 0.7, 0.5)) -> Image.Image:
    """Draw the reference's latent frames, and the flow to the next one as read at noise levels."""
    pipe = WanVideoPipeline.from_pretrained("nano", device="cpu")
    motion = motion_for("nano")
    video = VideoData(CLIP, height=64, width=64)
    # The frames with the object's path so far; the flow of the object's tokens.
    track = track_object(video)
    drawn = draw_trajectories(video, [track.centroids])
    rows = [[drawn[4 * step].resize((CELL, CELL), Image.Resampling.BICUBIC) for step in range(4)]]
    sure = known_tokens(list(video), (4, 8, 8, 2), track)
    for sigma in sigmas:
        flow = neighbour_flow(reference_flow(pipe, video, motion=motion, sigma=sigma), motion.sf)
        rows.append(colour_panels(flow, (CELL, CELL), largest=2.0, sure=sure))
    labels = [[f"latent frame {step} to {step + 1}" for step in range(4)]]
    return picture_grid(rows, labels, ["reference", *(f"sigma {sigma:g}" for sigma in sigmas)])


def schedule_figure() -> "Figure":
    """Draw the noise level of each step, guided ones as dots: published numbers, and the nano model's."""
    published = flow_match_sigmas(50, 0.75, 7.0).tolist()
    nano = flow_match_sigmas(25, 1.0, 3.0).tolist()
    coarse = [sigma * noise_scale(sigma, 2) for sigma in published[:10]]
    figure = new_figure(8.6, 3.4)
    axes = figure.add_subplot(xlabel="denoising step", ylabel="noise level", ylim=(0, 1))
    axes.plot(published, color=BLUE, label="50 steps, strength 0.75, shift 7; the first 10 guided")
    axes.plot(published[:10], "o", color=BLUE)
    axes.plot(nano, color=RED, label="nano: 25 steps, strength 1, shift 3; the first 18 guided")
    axes.plot(nano[:18], "o", color=RED)
    axes.plot(
        coarse,
        color=GREEN,
        label="the first with coarse guidance: the level of latents averaged over 2x2",
    )
    figure.legend(loc="outside upper center")
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
