"""Motion transfer: what is read from a reference video and how latents are moved towards it.

Read heads -> flow -> tile_flow -> losses -> amf -> optimizer -> guided_step for the method section of the
paper; `guidance` has its numbers, `released` what the released code does differently.
"""

from diffsynth.configs.options import MotionGuidance  # with its options in its docstring
from diffsynth.motion.flow import attention_motion_flow, frame_pairs
from diffsynth.motion.guided_step import guided_step, make_descriptor
from diffsynth.motion.heads import reduce_heads
from diffsynth.motion.optimizer import NonFiniteGuidanceError, OptimizationRecord, optimize_latents
from diffsynth.motion.reuse import GradientMemory
from diffsynth.motion.tile_flow import TileFlow, tile_motion_flow

__all__ = [
    "GradientMemory", "MotionGuidance", "NonFiniteGuidanceError", "OptimizationRecord", "TileFlow",
    "attention_motion_flow", "frame_pairs", "guided_step", "make_descriptor", "optimize_latents",
    "reduce_heads", "tile_motion_flow",
]  # fmt: skip
