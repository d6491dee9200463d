"""Looking at motion, and measuring it."""

from diffsynth.evaluation.flow_images import flow_to_image, save_flow_video

__all__ = ["flow_to_image", "save_flow_video"]
