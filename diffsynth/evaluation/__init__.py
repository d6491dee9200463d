"""Measure motion and draw it: motion fidelity, tracking, similarity to texts, pictures of flow."""

from diffsynth.evaluation.drawing import draw_trajectories
from diffsynth.evaluation.figures import loss_curves
from diffsynth.evaluation.flow_images import flow_sheet, flow_to_image, flow_video, save_flow_video
from diffsynth.evaluation.grid import side_by_side, video_grid
from diffsynth.evaluation.motion_fidelity import motion_fidelity, paired_fidelity
from diffsynth.evaluation.reference_flow import reference_flow
from diffsynth.evaluation.text_similarity import temporal_consistency_clip, text_similarity
from diffsynth.evaluation.trackers import track_points
from diffsynth.evaluation.tracking import track_object

__all__ = [
    "draw_trajectories", "flow_sheet", "flow_to_image", "flow_video",
    "loss_curves", "motion_fidelity", "paired_fidelity", "reference_flow",
    "save_flow_video", "side_by_side", "temporal_consistency_clip", "text_similarity", "track_object",
    "track_points", "video_grid",
]  # fmt: skip
