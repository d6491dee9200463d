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

import numpy as np
import torch
from PIL import Image

from diffsynth.data.frames import rgb_frames
from diffsynth.data.tensors import Video
from diffsynth.models.wan_video_image_encoder import PIXEL_MEAN, PIXEL_STD
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
    return float((_embed_frames(clip, frames) @ _embed_text(clip, prompt)).mean())


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
    images = _embed_frames(clip, frames)
    if len(images) < 2:
        raise ValueError("frames must be two or more; got 1")
    return float((images[1:] * images[:-1]).sum(-1).mean())


def _embed_frames(clip: Clip, frames: Video) -> torch.Tensor:
    """Return unit embeddings, float32 [T, D]."""
    model: Any = clip.model  # transformers types the parts of its config as dicts, too
    size = model.config.vision_config.image_size
    pixels = torch.stack([_pixels(image, size) for image in rgb_frames(frames)])
    with torch.no_grad():
        batches = (model.vision_model(pixel_values=part.to(model.device)) for part in pixels.split(_BATCH))
        embedded = [model.visual_projection(batch.pooler_output) for batch in batches]
    return torch.nn.functional.normalize(torch.cat(embedded), dim=-1)


def _pixels(image: Image.Image, size: int) -> torch.Tensor:
    """Return the middle square of an image whose shorter side was made `size`, normalised as in training."""
    scale = size / min(image.size)
    width, height = (max(size, int(scale * side)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    square = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / 255
    mean, deviation = np.array([PIXEL_MEAN, PIXEL_STD], np.float32)
    return torch.from_numpy((square - mean) / deviation).permute(2, 0, 1)


def _embed_text(clip: Clip, prompt: str) -> torch.Tensor:
    """Return the unit embedding, float32 [D]."""
    model: Any = clip.model
    limit = model.config.text_config.max_position_embeddings
    length = len(clip.tokenizer(prompt, verbose=False)["input_ids"])
    if length > limit:
        logger.warning("CLIP reads %d tokens; the last %d of the prompt do not count", limit, length - limit)
    tokens = clip.tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
    with torch.no_grad():
        read = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return torch.nn.functional.normalize(model.text_projection(read.pooler_output)[0], dim=-1)
