"""Measure how well a generated video follows a reference's motion and, with a CLIP, its prompt.

python examples/evaluate_video.py out.mp4 reference.mp4
python examples/evaluate_video.py out.mp4 reference.mp4 --prompt "a red car" --clip FOLDER

Needs OpenCV: pip install "fastvmt[eval]". Nothing is downloaded.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffsynth import VideoData
from diffsynth.evaluation.motion_fidelity import paired_fidelity, tracklet_fidelity
from diffsynth.evaluation.text_similarity import load_clip, temporal_consistency_clip, text_similarity
from diffsynth.evaluation.trackers import METHODS, Tracklets, track_points


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the videos that the command line names; return the exit code, 1 if they cannot be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("generated", type=Path, help="the video to measure")
    parser.add_argument("reference", type=Path, help="the video whose motion it should have")
    parser.add_argument("--prompt", help="what the generated video should show; measured with a CLIP")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP; also measures consistency over time")
    parser.add_argument("--tracker", choices=METHODS, default="auto", help="auto: cotracker if it is here")
    parser.add_argument("--checkpoint", type=Path, help="CoTracker's weights")
    parser.add_argument("--grid", type=int, default=40, help="points tracked in a row and in a column")
    parser.add_argument("--device", default="auto", help="where CLIP and CoTracker run")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        values = measure(options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            number = f"{value:.4f}" if isinstance(value, float) else str(value)
            print(f"{name.replace('_', ' '):<42}{number:>8}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, float | int]:
    """What was measured, by name.

    The reference is brought to the generated video's size, as the pipeline does, and the longer video is cut
    to the length of the shorter.
    """
    # First, so that a missing CLIP is known before the minutes of tracking.
    clip = None
    if options.prompt is not None or options.clip is not None:
        clip = load_clip(options.clip, device=options.device)
    generated = VideoData(options.generated)
    height, width = generated.shape()
    reference = VideoData(options.reference, height=height, width=width)
    count = min(len(generated), len(reference))
    frames = generated[:count]
    tracking = {
        "method": options.tracker,
        "grid": options.grid,
        "checkpoint": options.checkpoint,
        "device": options.device,
    }
    own, other = (track_points(video, **tracking) for video in (frames, reference[:count]))
    backwards = Tracklets(points=other.points[:, ::-1], visible=other.visible[:, ::-1])
    values = {
        "frames_compared": count,
        "motion_fidelity_at_same_place": paired_fidelity(own, other),
        "motion_fidelity": tracklet_fidelity(own, other),
        # What a wrong motion of the same kind scores: the figure above says little if it is no higher.
        "motion_fidelity_of_reference_backwards": tracklet_fidelity(backwards, other),
    }
    if clip is not None:
        values["temporal_consistency_clip"] = temporal_consistency_clip(frames, clip=clip)
    if options.prompt is not None:
        values["text_similarity_clip"] = text_similarity(frames, options.prompt, clip=clip)
    return values


if __name__ == "__main__":
    sys.exit(main())
