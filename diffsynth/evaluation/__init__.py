"""Looking at motion, and measuring it."""

from diffsynth.evaluation.flow_images import flow_to_image, save_flow_video
from diffsynth.evaluation.reference_flow import reference_flow

__all__ = ["flow_to_image", "reference_flow", "save_flow_video"]
