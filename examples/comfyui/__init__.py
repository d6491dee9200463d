"""ComfyUI nodes: load a checkpoint, a motion reference, transfer, save; see README.md.

Pictures go in and come out as Comfy has them: float32 [T, H, W, 3] from 0 to 1.
"""

from pathlib import Path
from typing import Any

import torch

from diffsynth import WanVideoPipeline, save_video
from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.configs.defaults import EXACT
from diffsynth.configs.options import DTYPES, MODES, LoadOptions
from diffsynth.jobs.models import load_pipeline
from diffsynth.pipelines.denoise import RunEvent

CATEGORY = "FastVMT"


class LoadCheckpoint:
    """A Wan checkpoint by name ("nano", "1.3b", "14b") or folder."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("FASTVMT_MODEL",), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("STRING", {"default": "nano"}),
                "device": ("STRING", {"default": "auto"}),
                "dtype": (["default", *DTYPES],),
                "offload": ("BOOLEAN", {"default": False}),
            }
        }

    def load(self, model: str, device: str, dtype: str, offload: bool) -> tuple[WanVideoPipeline]:
        options = LoadOptions(device=device, dtype=None if dtype == "default" else dtype, offload=offload)
        return (load_pipeline(checkpoint_folder(model, _models_folder()), options),)


class MotionReference:
    """The frames whose motion is transferred, or a part of them."""

    CATEGORY, FUNCTION = CATEGORY, "take"
    RETURN_TYPES, RETURN_NAMES = ("FASTVMT_REFERENCE",), ("reference",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE",),
                "first": ("INT", {"default": 0, "min": 0, "max": 100_000}),
                "count": ("INT", {"default": 0, "min": 0, "max": 100_000}),  # 0: all
            }
        }

    def take(self, images: torch.Tensor, first: int, count: int) -> tuple[Any]:
        used = images[first : first + count if count else None, ..., :3]
        if len(used) < 2:
            raise ValueError(f"a motion reference needs 2 frames or more; got {len(used)} of {len(images)}")
        return ((used.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy(),)


class TransferMotion:
    """A video that shows the prompt and moves as the reference does."""

    CATEGORY, FUNCTION = CATEGORY, "transfer"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("FASTVMT_MODEL",),
                "prompt": ("STRING", {"default": "", "multiline": True}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1}),
                "mode": (list(MODES),),
                "preset": ([EXACT, "balanced", "fast"],),
                "motion_scale": ("FLOAT", {"default": 1.0, "min": 0.1, "max": 10.0, "step": 0.1}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),  # 0: the model's or the preset's
            },
            "optional": {
                "reference": ("FASTVMT_REFERENCE",),
                "negative_prompt": ("STRING", {"default": "", "multiline": True}),
            },
        }

    def transfer(
        self,
        model: WanVideoPipeline,
        prompt: str,
        seed: int,
        mode: str,
        preset: str,
        motion_scale: float,
        steps: int,
        reference: Any = None,
        negative_prompt: str = "",
    ) -> tuple[torch.Tensor]:
        if not prompt.strip():
            raise ValueError("the prompt is empty: what shall the video show?")
        made = model(
            prompt,
            negative_prompt or None,
            reference,
            seed=seed,
            mode=mode,
            preset=preset,
            motion_scale=None if motion_scale == 1 or mode == "No_transfer" else motion_scale,
            num_inference_steps=steps or None,
            output_type="np",
            progress_bar_cmd=iter,
            observer=_Progress(),
        )
        return (torch.from_numpy(made).float() / 255,)


class SaveVideo:
    """An mp4 in Comfy's output folder."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "save", True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE",),
                "fps": ("FLOAT", {"default": 15.0, "min": 1.0, "max": 240.0}),
                "filename_prefix": ("STRING", {"default": "fastvmt"}),
            }
        }

    def save(self, images: torch.Tensor, fps: float, filename_prefix: str) -> dict[str, Any]:
        folder, name = _output_folder(), Path(filename_prefix).name or "fastvmt"
        number = 1 + sum(1 for _ in folder.glob(f"{name}_*.mp4"))
        frames = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        path = save_video(frames, folder / f"{name}_{number:05}.mp4", fps=fps, quality=8)
        return {
            "ui": {
                "images": [{"filename": path.name, "subfolder": "", "type": "output"}],
                "animated": (True,),
            }
        }


class _Progress:
    """Moves Comfy's bar, and ends the run when Comfy's Cancel was pressed."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, event: RunEvent) -> None:
        try:
            from comfy.model_management import throw_exception_if_processing_interrupted
            from comfy.utils import ProgressBar
        except ImportError:  # used outside of Comfy
            return
        throw_exception_if_processing_interrupted()
        if event.stage == "sampling" and event.steps:
            self._bar = self._bar or ProgressBar(event.steps)
            self._bar.update_absolute(event.step, event.steps)


def _output_folder() -> Path:
    try:
        import folder_paths
    except ImportError:  # used outside of Comfy
        return Path.cwd()
    return Path(folder_paths.get_output_directory())


def _models_folder() -> Path:
    try:
        import folder_paths
    except ImportError:
        return Path("models")
    return Path(folder_paths.models_dir) / "fastvmt"


NODE_CLASS_MAPPINGS = {
    "FastVMTLoadCheckpoint": LoadCheckpoint,
    "FastVMTMotionReference": MotionReference,
    "FastVMTTransferMotion": TransferMotion,
    "FastVMTSaveVideo": SaveVideo,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FastVMTLoadCheckpoint": "FastVMT: load checkpoint",
    "FastVMTMotionReference": "FastVMT: motion reference",
    "FastVMTTransferMotion": "FastVMT: transfer motion",
    "FastVMTSaveVideo": "FastVMT: save video",
}
