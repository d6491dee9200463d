"""FastVMT: training-free video motion transfer with Wan2.1.

The public names load on first use, so that importing the package costs nothing until a model is built.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffsynth.data import VideoData, save_frames, save_video
    from diffsynth.models.model_manager import ModelManager
    from diffsynth.pipelines.wan_video import WanVideoPipeline

__version__ = "0.1.0"
__all__ = ["ModelManager", "VideoData", "WanVideoPipeline", "save_frames", "save_video"]

_HOMES = {
    "ModelManager": "diffsynth.models.model_manager",
    "WanVideoPipeline": "diffsynth.pipelines.wan_video",
    "VideoData": "diffsynth.data",
    "save_video": "diffsynth.data",
    "save_frames": "diffsynth.data",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffsynth' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
