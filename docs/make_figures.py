"""Draw the figures of docs/how_it_works.md: the method, the flow that the nano model reads, noise, losses.

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
from diffsynth.schedulers import FlowMatchScheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
CLIP = HERE.parent / "examples" / "data" / "bounce.mp4"
CELL = 200  # pixels
# Boxes of the diagram: centre (x, y) in its units, text; then arrows from box to box, and a label.
BOXES = {
    "reference": (1.1, 3.2, "reference video\n+ noise of this level"),
    "latents": (1.1, 1.0, "latents of\nthe new video"),
    "dit 1": (3.7, 3.2, "DiT blocks,\nup to one of them"),
    "dit 2": (3.7, 1.0, "the same blocks"),
    "qk 1": (6.1, 3.2, "queries and keys\nof that block"),
    "qk 2": (6.1, 1.0, "queries and keys"),
    "flow 1": (8.5, 3.2, "flow of each tile\nto the next frames"),
    "flow 2": (8.5, 1.0, "flow of each tile"),
    "loss": (10.8, 2.1, "motion loss:\nhow far the\nflows differ"),
    "step": (1.1, 2.1, "then the denoising step,\nto the next noise level"),
}
ARROWS = (
    ("reference", "dit 1"), ("dit 1", "qk 1"), ("qk 1", "flow 1"), ("flow 1", "loss"),
    ("latents", "dit 2"), ("dit 2", "qk 2"), ("qk 2", "flow 2"), ("flow 2", "loss"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path, help="of a run of the nano model with guidance")
    losses = read_record(parser.parse_args().record).cost["losses"]
    flow_picture().save(HERE / "flow_levels.png", optimize=True)
    schedule_figure().savefig(HERE / "schedule.png")
    loss_curves(losses).savefig(HERE / "losses.png")
    method_diagram().savefig(HERE / "method.png")


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


def method_diagram() -> "Figure":
    """Draw one guided step: both videos are read alike, and the latents follow the gradient of the loss."""
    figure = new_figure(10, 4.4)
    axes = figure.add_subplot(xlim=(-0.2, 12), ylim=(-0.6, 3.9))
    axes.set_axis_off()
    drawn = {}
    for name, (x, y, text) in BOXES.items():
        colour = RED if name in ("loss", "latents") else GREEN if name == "step" else BLUE
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": colour}
        drawn[name] = axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box)

    def arrow(begin: str, end: str, colour: str) -> None:
        style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 3, "shrinkB": 3}
        style |= {"patchA": drawn[begin].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        axes.annotate("", BOXES[end][:2], BOXES[begin][:2], arrowprops=style)

    for begin, end in ARROWS:
        arrow(begin, end, BLUE)
    arrow("latents", "step", GREEN)
    axes.plot([10.8, 10.8, 1.1], [1.6, 0, 0], color=RED, linewidth=1)
    axes.annotate("", (1.1, 0.68), (1.1, -0.01), arrowprops={"arrowstyle": "-|>", "color": RED})
    axes.text(
        6, -0.25, "gradient: the latents move, several times a step", color=RED, fontsize=9, ha="center"
    )
    return figure


def schedule_figure() -> "Figure":
    """Draw the noise level of each step, guided ones as dots: published numbers, and the nano model's."""
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(50, 0.75, 7.0)
    published = scheduler.sigmas.tolist()
    scheduler.set_timesteps(25, 1.0, 3.0)
    nano = scheduler.sigmas.tolist()
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
