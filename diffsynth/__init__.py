"""FastVMT: training-free video motion transfer with Wan2.1.

The public names load on first use, so that importing the package costs nothing until a model is built.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsynth.data import VideoData, save_frames, save_video
    from diffsynth.models.model_manager import ModelManager
    from diffsynth.motion import MotionGuidance
    from diffsynth.notebook import display
    from diffsynth.pipelines.fallback import MemoryRanOutError
    from diffsynth.pipelines.saved_latents import decode_saved
    from diffsynth.pipelines.saved_run import clear_checkpoints
    from diffsynth.pipelines.stop_signals import RunInterrupted
    from diffsynth.pipelines.wan_video import WanVideoPipeline

__version__ = "0.1.0"
__all__ = [
    "MemoryRanOutError",
    "ModelManager",
    "MotionGuidance",
    "RunInterrupted",
    "VideoData",
    "WanVideoPipeline",
    "clear_checkpoints",
    "decode_saved",
    "display",
    "save_frames",
    "save_video",
]

_HOMES = {
    "MemoryRanOutError": "diffsynth.pipelines.fallback",
    "ModelManager": "diffsynth.models.model_manager",
    "MotionGuidance": "diffsynth.motion",
    "RunInterrupted": "diffsynth.pipelines.stop_signals",
    "VideoData": "diffsynth.data",
    "WanVideoPipeline": "diffsynth.pipelines.wan_video",
    "clear_checkpoints": "diffsynth.pipelines.saved_run",
    "decode_saved": "diffsynth.pipelines.saved_latents",
    "display": "diffsynth.notebook",
    "save_frames": "diffsynth.data",
    "save_video": "diffsynth.data",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffsynth' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
