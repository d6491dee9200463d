"""Motion fidelity by CoTracker3 (Karaev et al. 2024), the family of the published figures.

python -m benchmarks.quality.cotracker out.mp4 ref.mp4
Needs CoTracker's code, installed or in torch.hub's cache, and its offline weights; nothing is downloaded. The
reference is brought to the size of the generated video, and the longer one is cut.
"""

import argparse
import importlib.util
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path

import torch

from diffsynth import VideoData
from diffsynth.data.tensors import Video
from diffsynth.evaluation.motion_fidelity import motion_fidelity
from diffsynth.evaluation.trackers import Tracklets, grid_points
from diffsynth.evaluation.tracking import video_array
from diffsynth.vram_management import choose_device

WEIGHTS = "scaled_offline.pth"
REPOSITORY = "facebookresearch_co-tracker_main"
URL = f"https://huggingface.co/facebook/cotracker3/resolve/main/{WEIGHTS}"


def load_cotracker(
    weights: str | PathLike | None = None, device: str | torch.device = "auto"
) -> torch.nn.Module:
    """Load CoTracker3's offline predictor, from the installed package or torch.hub's copy of its code.

    Raises:
        FileNotFoundError: the weights are missing; by default they are looked for in torch.hub's cache.
        ImportError: the code is missing.
        ValueError: the weights are those of another model.
    """
    hub = Path(torch.hub.get_dir())
    file = hub / "checkpoints" / WEIGHTS if weights is None else Path(weights)
    if not file.is_file():
        raise FileNotFoundError(
            f"CoTracker's weights {file} do not exist: put {URL} there, or give --weights"
        )
    repository = hub / REPOSITORY
    if importlib.util.find_spec("cotracker"):
        code = importlib.import_module("cotracker.predictor")
        predictor = code.CoTrackerPredictor(checkpoint=None, window_len=60, v2=False)
    elif repository.is_dir():
        predictor = torch.hub.load(str(repository), "cotracker3_offline", source="local", pretrained=False)
    else:
        raise ImportError(
            "CoTracker's code is missing: install https://github.com/facebookresearch/co-tracker, or clone "
            f"it to {repository}"
        )
    state = torch.load(file, map_location="cpu", weights_only=True)
    try:
        predictor.model.load_state_dict(state.get("model", state))
    except RuntimeError as error:
        raise ValueError(f"weights {file} are not CoTracker3's {WEIGHTS}: {error}") from error
    return predictor.to(choose_device(device)).eval()


def track(model: torch.nn.Module, frames: Video, grid: int = 40) -> Tracklets:
    """Track grid x grid points of frame 0 through a video by a loaded CoTracker."""
    device, video = next(model.parameters()).device, video_array(frames)
    points = grid_points(video.shape[1], video.shape[2], grid)
    positions = torch.from_numpy(points[:, ::-1] - 0.5)  # CoTracker: (frame, column, row), first centre at 0
    queries = torch.cat([torch.zeros(len(positions), 1), positions], dim=-1)
    clip = torch.from_numpy(video).permute(0, 3, 1, 2).float()  # 0 to 255
    with torch.no_grad():
        tracks, visible = model(clip[None].to(device), queries=queries[None].to(device))
    return Tracklets(
        points=(tracks[0].flip(-1) + 0.5).transpose(0, 1).float().cpu().numpy(),
        visible=visible[0].transpose(0, 1).bool().cpu().numpy(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generated")
    parser.add_argument("reference")
    parser.add_argument("--weights", help=f"{WEIGHTS}; by default torch.hub's")
    parser.add_argument("--grid", type=int, default=40, help="points in a row and column")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model = load_cotracker(args.weights, args.device)
    generated = VideoData(args.generated)
    height, width = generated.shape()
    reference = VideoData(args.reference, height=height, width=width)
    count = min(len(generated), len(reference))
    own, other = (list(islice(video, count)) for video in (generated, reference))
    score = motion_fidelity(own, other, tracker=partial(track, model, grid=args.grid))
    print(f"motion fidelity by CoTracker3 over {count} frames: {score:.4f}")


if __name__ == "__main__":
    main()
