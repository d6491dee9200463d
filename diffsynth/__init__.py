"""FastVMT: training-free video motion transfer with Wan2.1.

The public names load on first use, so that importing the package costs nothing until a model is built.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from diffsynth.version import __version__

if TYPE_CHECKING:
    from diffsynth.data import VideoData, save_frames, save_video
    from diffsynth.evaluation.notebook import display
    from diffsynth.jobs.decode import decode_saved
    from diffsynth.models.model_manager import ModelManager
    from diffsynth.motion import MotionGuidance
    from diffsynth.pipelines.wan_video import WanVideoPipeline
    from diffsynth.planning.ladder import MemoryRanOutError
    from diffsynth.runs.checkpoint import clear_checkpoints
    from diffsynth.runs.signals import RunInterrupted

__all__ = [
    "MemoryRanOutError", "ModelManager", "MotionGuidance", "RunInterrupted", "VideoData",
    "WanVideoPipeline", "__version__", "clear_checkpoints", "decode_saved", "display", "save_frames",
    "save_video",
]  # fmt: skip

_HOMES = {
    "MemoryRanOutError": "diffsynth.planning.ladder",
    "ModelManager": "diffsynth.models.model_manager",
    "MotionGuidance": "diffsynth.motion",
    "RunInterrupted": "diffsynth.runs.signals",
    "VideoData": "diffsynth.data",
    "WanVideoPipeline": "diffsynth.pipelines.wan_video",
    "clear_checkpoints": "diffsynth.runs.checkpoint",
    "decode_saved": "diffsynth.jobs.decode",
    "display": "diffsynth.evaluation.notebook",
    "save_frames": "diffsynth.data",
    "save_video": "diffsynth.data",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffsynth' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
