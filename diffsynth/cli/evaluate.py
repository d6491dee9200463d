"""`fastvmt evaluate`: measure how well a video follows a reference's motion and, with a CLIP, its prompt."""

from argparse import Namespace
from itertools import islice

from diffsynth.cli.console import DONE, Console
from diffsynth.configs.fields import fields_of
from diffsynth.configs.options import ReferenceOptions
from diffsynth.data import VideoData
from diffsynth.evaluation.motion_fidelity import paired_fidelity, tracklet_fidelity
from diffsynth.evaluation.text_similarity import load_clip, temporal_consistency_clip, text_similarity
from diffsynth.evaluation.trackers import Tracklets, track_points
from diffsynth.jobs.task import open_reference


def run(options: Namespace, console: Console) -> int:
    """Print the measures.

    The reference is brought to the generated video's size, as the pipeline does, and the longer video is cut
    to the length of the shorter.
    """
    # First, so that a missing CLIP is known before the minutes of tracking.
    clip = None
    if options.prompt is not None or options.clip is not None:
        clip = load_clip(options.clip, device=options.device)
    generated = VideoData(options.generated)
    height, width = generated.shape()
    used = fields_of(ReferenceOptions, vars(options))
    reference = open_reference(options.reference, used, height=height, width=width)
    count = min(len(generated), len(reference))
    frames, others = (list(islice(video, count)) for video in (generated, reference))
    own, other = (track_points(video, grid=options.grid) for video in (frames, others))
    backwards = Tracklets(points=other.points[:, ::-1], visible=other.visible[:, ::-1])
    values: dict[str, float | int] = {
        "frames_compared": count,
        "motion_fidelity_at_same_place": paired_fidelity(own, other),
        "motion_fidelity": tracklet_fidelity(own, other),
        # The score of a wrong motion of the same kind: the one above says little if it is no higher.
        "motion_fidelity_of_reference_backwards": tracklet_fidelity(backwards, other),
    }
    if clip is not None:
        values["temporal_consistency_clip"] = temporal_consistency_clip(frames, clip=clip)
    if options.prompt is not None:
        values["text_similarity_clip"] = text_similarity(frames, options.prompt, clip=clip)
    for name, value in values.items():
        number = f"{value:.4f}" if isinstance(value, float) else str(value)
        console.say(f"{name.replace('_', ' '):<42}{number:>8}")
    console.result(values)
    return DONE
