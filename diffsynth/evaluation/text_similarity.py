"""CLIP similarity of a video's frames to a text and to each other (CLIP: Radford et al. 2021).

These are the "text similarity" and the "temporal consistency" that FastVMT, DiTFlow and others report. The
model is read from a folder on this machine; nothing is downloaded. Figures of different CLIPs are not
comparable.
"""

import logging
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from diffsynth.data.frames import rgb_frames
from diffsynth.data.tensors import Video
from diffsynth.vram_management.memory import choose_device

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("models/clip-vit-base-patch32")
FOLDER_VARIABLE = "DIFFSYNTH_CLIP"
# One of each group must be there.
_FILES = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    ("tokenizer.json", "vocab.json"),
)
_BATCH = 16  # frames that are embedded at once


class Clip(NamedTuple):
    """A loaded CLIP, in float32 and in eval mode on its device, and the tokenizer of its texts."""

    model: "CLIPModel"
    tokenizer: "PreTrainedTokenizerBase"


def load_clip(folder: str | PathLike | None = None, *, device: str | torch.device = "auto") -> Clip:
    """Load a CLIP as published on Hugging Face (CLIPModel of transformers, with its tokenizer).

    Raises:
        FileNotFoundError: the folder or a file of it is missing; the message has the command that fetches it.
        ValueError: its weights are not a whole CLIP.
    """
    folder = Path(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)
    for names in _FILES:
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(
                f"there is no CLIP in {folder}: {' or '.join(names)} is missing. Fetch one with "
                f'"hf download openai/clip-vit-base-patch32 --local-dir {folder}" (1.8 GB), or name the '
                f"folder of another by the argument clip or the variable {FOLDER_VARIABLE}"
            )
    device = choose_device(device)
    from transformers import AutoTokenizer, CLIPModel

    loaded: Any = CLIPModel.from_pretrained(
        folder, local_files_only=True, weights_only=True, output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{folder} is no CLIP: it lacks {sorted(report['missing_keys'])[0]} and others")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Clip(model=model.eval().to(device, torch.float32), tokenizer=tokenizer)


def text_similarity(frames: Video, prompt: str, *, clip: Clip | str | PathLike | None = None) -> float:
    """Return the mean over the frames of the cosine between a frame's embedding and the prompt's, -1 to 1.

    Args:
        frames: the video; CLIP sees the largest square in the middle of each frame.
        prompt: the text. If CLIP reads fewer tokens (77), the start alone counts, with a warning in the log.
        clip: a loaded one, or a folder as for `load_clip`.

    Raises:
        ValueError, TypeError: the prompt is empty, or a frame is none.
        What `load_clip` raises.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt must be a text with words in it; got {prompt!r}")
    clip = clip if isinstance(clip, Clip) else load_clip(clip)
    images, text = _embed(clip, frames, prompt)
    return float((images @ text).mean())


def temporal_consistency_clip(frames: Video, *, clip: Clip | str | PathLike | None = None) -> float:
    """Return the mean cosine between the embeddings of each frame and the next, -1 to 1; still ones have 1.

    Args:
        frames: the video, two frames or more.
        clip: a loaded one, or a folder as for `load_clip`.

    Raises:
        ValueError, TypeError: there is a single frame, or a frame is none.
        What `load_clip` raises.
    """
    clip = clip if isinstance(clip, Clip) else load_clip(clip)
    images, _ = _embed(clip, frames)
    if len(images) < 2:
        raise ValueError("frames must be two or more; got 1")
    return float((images[1:] * images[:-1]).sum(-1).mean())


def _embed(clip: Clip, frames: Video, text: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unit embeddings of frames, float32 [T, D], and of a text, [D]."""
    import transformers

    # The first is new in transformers 5, and does without torchvision.
    names = ("CLIPImageProcessorPil", "CLIPImageProcessor")
    make = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    model: Any = clip.model  # transformers types the parts of its config as dicts, too
    size, limit = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    process = make(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pixels = process(list(rgb_frames(frames)), return_tensors="pt")["pixel_values"]
    length = len(clip.tokenizer(text, verbose=False)["input_ids"])
    if length > limit:
        logger.warning("CLIP reads %d tokens; the last %d of the prompt do not count", limit, length - limit)
    tokens = clip.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
    with torch.no_grad():
        outputs = [model(pixel_values=part.to(model.device), **tokens) for part in pixels.split(_BATCH)]
    return torch.cat([out.image_embeds for out in outputs]), outputs[0].text_embeds[0]
