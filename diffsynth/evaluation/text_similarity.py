"""CLIP similarity of a video's frames to a text and to each other (CLIP: Radford et al. 2021).

These are the "text similarity" and the "temporal consistency" that FastVMT, DiTFlow and others report. The
model is read from a folder on this machine; nothing is downloaded. Figures of different CLIPs are not
comparable.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from diffsynth.data.frames import rgb_frames
from diffsynth.evaluation.tracking import Frames
from diffsynth.vram_management.memory import choose_device

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("models/clip-vit-base-patch32")
FOLDER_VARIABLE = "DIFFSYNTH_CLIP"
# Mean and deviation of RGB from 0 to 1 that CLIPs have been trained with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
_BATCH = 16  # frames that are embedded at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A loaded CLIP: the model, in float32 and in eval mode on its device, and its tokenizer."""

    model: "CLIPModel"
    tokenizer: "PreTrainedTokenizerBase"


def load_clip(folder: str | PathLike | None = None, *, device: str | torch.device = "auto") -> Clip:
    """Read a CLIP as published on Hugging Face (CLIPModel of transformers, with its tokenizer).

    folder: DIFFSYNTH_CLIP of the environment if None, else models/clip-vit-base-patch32.
    Raises FileNotFoundError, with the command that fetches it, if the folder or a file of it is not there,
    and ValueError if its weights are not a whole CLIP.
    """
    folder = Path(folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)
    _check_files(folder)
    device = choose_device(device)
    from transformers import AutoTokenizer, CLIPModel

    model, report = CLIPModel.from_pretrained(
        folder, local_files_only=True, weights_only=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(
            f"{folder} is no CLIP: its weights lack {sorted(report['missing_keys'])[0]} and others"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Clip(model=model.eval().to(device, torch.float32), tokenizer=tokenizer)


def _check_files(folder: Path) -> None:
    groups = (
        ("config.json",),
        ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
        ("tokenizer.json", "vocab.json"),
    )
    for names in groups:
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(
                f"there is no CLIP in {folder}: {' or '.join(names)} is missing. Fetch one with "
                f'"hf download openai/clip-vit-base-patch32 --local-dir {folder}" (1.8 GB), or name the '
                f"folder of another by the argument clip or the variable {FOLDER_VARIABLE}"
            )


def text_similarity(frames: Frames, prompt: str, *, clip: Clip | str | PathLike | None = None) -> float:
    """Mean over the frames of the cosine between a frame's embedding and the prompt's, -1 to 1.

    frames: PIL images or uint8 [T, H, W, 3]; of each, CLIP sees the largest square in the middle. Of a
    prompt longer than CLIP reads (77 tokens), the start alone counts, with a warning in the log.
    clip: a loaded one, or a folder, see `load_clip`.
    Raises ValueError for an empty prompt, what `load_clip` raises, and TypeError or ValueError, naming the
    frame, for what is no video.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt must be a text with words in it; got {prompt!r}")
    clip = clip if isinstance(clip, Clip) else load_clip(clip)
    return float((_embed_frames(clip, frames) @ _embed_text(clip, prompt)).mean())


def temporal_consistency_clip(frames: Frames, *, clip: Clip | str | PathLike | None = None) -> float:
    """Mean cosine between the embeddings of each frame and the next, -1 to 1; 1 for a still picture.

    frames, clip: as for `text_similarity`.
    Raises ValueError for a single frame, what `load_clip` raises, and TypeError or ValueError, naming the
    frame, for what is no video.
    """
    clip = clip if isinstance(clip, Clip) else load_clip(clip)
    images = _embed_frames(clip, frames)
    if len(images) < 2:
        raise ValueError("frames must be two or more; got 1")
    return float((images[1:] * images[:-1]).sum(-1).mean())


def _embed_frames(clip: Clip, frames: Frames) -> torch.Tensor:
    """Unit embeddings: float32 [T, D]."""
    model = clip.model
    size = model.config.vision_config.image_size
    images = rgb_frames(frames)
    embedded = []
    with torch.no_grad():
        for batch in _batches(images):
            pixels = torch.stack([_pixels(image, size) for image in batch]).to(model.device)
            pooled = model.vision_model(pixel_values=pixels).pooler_output
            embedded.append(model.visual_projection(pooled))
    return torch.nn.functional.normalize(torch.cat(embedded), dim=-1)


def _batches(images: Iterator[Image.Image]) -> Iterator[list[Image.Image]]:
    while batch := list(islice(images, _BATCH)):
        yield batch


def _pixels(image: Image.Image, size: int) -> torch.Tensor:
    """As CLIP has been trained: the shorter side made `size` (bicubic), the middle square, normalised."""
    scale = size / min(image.size)
    width, height = (max(size, int(scale * side)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    square = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / 255
    return torch.from_numpy((square - np.float32(_MEAN)) / np.float32(_DEVIATION)).permute(2, 0, 1)


def _embed_text(clip: Clip, prompt: str) -> torch.Tensor:
    """Unit embedding: float32 [D]."""
    model = clip.model
    limit = model.config.text_config.max_position_embeddings
    given = len(clip.tokenizer(prompt, verbose=False)["input_ids"])
    if given > limit:
        logger.warning("CLIP reads %d tokens; the last %d of the prompt do not count", limit, given - limit)
    tokens = clip.tokenizer(prompt, truncation=True, max_length=limit, return_tensors="pt").to(model.device)
    with torch.no_grad():
        pooled = model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return torch.nn.functional.normalize(model.text_projection(pooled)[0], dim=-1)
