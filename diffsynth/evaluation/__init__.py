"""Looking at motion, and measuring it."""

from benchmarks.quality.adherence import check_prompt
from benchmarks.quality.contact_sheet import contact_sheet
from benchmarks.quality.methods import standard_methods
from benchmarks.quality.metrics import flow_error, trajectory_error
from benchmarks.quality.pairs import evaluate, make_pairs
from benchmarks.quality.report import markdown_table, summarise
from diffsynth.evaluation.compare import side_by_side, video_grid
from diffsynth.evaluation.flow_images import (
    draw_arrows,
    flow_to_image,
    flow_video,
    flow_wheel,
    overlay_flow,
    save_flow_video,
)
from diffsynth.evaluation.motion_fidelity import motion_fidelity, paired_fidelity
from diffsynth.evaluation.motion_pictures import compare_motion, draw_trajectories, flow_sheet
from diffsynth.evaluation.plot import loss_curves
from diffsynth.evaluation.probe import probe_motion
from diffsynth.evaluation.probe_report import ProbeResult, suggest
from diffsynth.evaluation.reference_flow import reference_flow
from diffsynth.evaluation.text_similarity import temporal_consistency_clip, text_similarity
from diffsynth.evaluation.trackers import track_points
from diffsynth.evaluation.tracking import track_object

__all__ = [
    "ProbeResult",
    "check_prompt",
    "compare_motion",
    "contact_sheet",
    "draw_arrows",
    "draw_trajectories",
    "evaluate",
    "flow_error",
    "flow_sheet",
    "flow_to_image",
    "flow_video",
    "flow_wheel",
    "loss_curves",
    "make_pairs",
    "markdown_table",
    "motion_fidelity",
    "overlay_flow",
    "paired_fidelity",
    "probe_motion",
    "reference_flow",
    "save_flow_video",
    "side_by_side",
    "standard_methods",
    "suggest",
    "summarise",
    "temporal_consistency_clip",
    "text_similarity",
    "track_object",
    "track_points",
    "trajectory_error",
    "video_grid",
]
