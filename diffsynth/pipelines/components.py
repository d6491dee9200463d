"""The models of a pipeline, how they are loaded and where they are; facts of models and videos for a run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.configs.resolve import ModelFacts, ReferenceFacts
from diffsynth.data import VideoData
from diffsynth.data.tensors import Video, frame_size
from diffsynth.models.checkpoint_files import DOWNLOAD_HINT
from diffsynth.models.model_kinds import KINDS
from diffsynth.models.model_manager import LoadedModel, ModelManager, check_dtype
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.planning.sizes import ModelSizes
from diffsynth.prompters import WanPrompter
from diffsynth.prompters.tokenizer import WanTokenizer, find_tokenizer, load_tokenizer, tokenizer_from_pieces
from diffsynth.vram_management import Residency, choose_device

# What models can compute in; eight bits are for storage.
WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """DiT, text encoder, VAE and prompter of a pipeline; `residency` brings models to the compute device.

    Raises:
        ValueError: the models do not belong together.
    """

    dit: WanModel
    text_encoder: WanTextEncoder
    vae: WanVideoVAE
    prompter: WanPrompter
    residency: Residency

    def __post_init__(self) -> None:
        if self.dit.has_image_input or self.dit.in_dim != self.vae.z_dim:
            raise ValueError(
                f"this pipeline takes a text-to-video DiT of {self.vae.z_dim} input channels; got one with "
                f"in_dim={self.dit.in_dim}, has_image_input={self.dit.has_image_input}"
            )
        if self.dit.text_dim != self.text_encoder.dim:
            raise ValueError(
                f"the DiT takes text of width {self.dit.text_dim}, "
                f"the text encoder gives {self.text_encoder.dim}"
            )

    @property
    def device(self) -> torch.device:
        """The compute device."""
        return self.residency.device

    def to(
        self, device: str | torch.device | None = None, torch_dtype: torch.dtype | None = None
    ) -> "Components":
        """Return the models on another device, or with DiT and text encoder in another dtype."""
        if torch_dtype is not None:
            check_dtype(torch_dtype, WIDE_DTYPES)
            self.dit.to(torch_dtype)
            self.text_encoder.to(torch_dtype)
        if device is None:
            return self
        self.residency.stop_streaming()
        residency = Residency(self.residency.models, choose_device(device))
        residency.offload = self.residency.offload
        return replace(self, residency=residency)

    def facts(self) -> ModelFacts:
        """Return the facts about the models that decide options of a run."""
        return ModelSizes.of(self.residency.models).facts()


def load_checkpoint(
    path: str | Path,
    torch_dtype: torch.dtype,
    vae_dtype: torch.dtype,
    loras: Mapping[str, float] | Mapping[Path, float],
    parts: Mapping[str, str | Path],
) -> ModelManager:
    """Load the three models of a checkpoint folder, or of a name as for `from_pretrained`, and LoRAs.

    Args:
        torch_dtype: dtype of DiT and text encoder.
        loras: LoRA file -> strength.
        parts: weights of "dit", "text_encoder" and "vae" that are loaded instead of the folder's.

    Raises:
        TypeError: parts has another name.
        FileNotFoundError: a file is missing.
        CheckpointError: a file is damaged or of another kind.
    """
    folder = checkpoint_folder(path)
    for file in loras:
        if not Path(file).is_file():
            raise FileNotFoundError(f"LoRA {file} does not exist")
    manager = ModelManager(torch_dtype=torch_dtype)
    kinds = {kind.name.removeprefix("wan_video_"): kind.name for kind in KINDS}
    if unknown := sorted(parts.keys() - kinds.keys()):
        raise TypeError(f"weights can be given for {', '.join(kinds)}; got {', '.join(unknown)}")
    if wanted := [kind for name, kind in kinds.items() if name not in parts]:
        manager.load_models([folder], vae_dtype=vae_dtype, model_names=wanted)
    for name, file in parts.items():
        manager.load_models([file], vae_dtype=vae_dtype, model_names=[kinds[name]])
    missing = set(kinds.values()) - {model.name for model in manager.loaded}
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the weights of {', '.join(sorted(missing))}; {DOWNLOAD_HINT}"
        )
    for file, strength in loras.items():
        manager.load_lora(file, strength)
    return manager


def tokenizer_of(text_encoder: LoadedModel, folder: str | Path | None = None) -> WanTokenizer:
    """Return the tokenizer in a folder, by default the one in or beside the text encoder's weights.

    Raises:
        FileNotFoundError: no tokenizer is found.
    """
    if folder is not None:
        return load_tokenizer(folder)
    if text_encoder.pieces is not None:
        pieces = bytes(text_encoder.pieces.read().tolist())
        return tokenizer_from_pieces(pieces, text_encoder.pieces.file)
    return load_tokenizer(find_tokenizer(text_encoder.files[0].parent))


def reference_facts(video: Video | None) -> ReferenceFacts | None:
    """Return number, size and rate of the frames of a reference video; None without one.

    Raises:
        TypeError: the video is not a VideoData, images or a uint8 array.
        ValueError: the video has no frames.
    """
    if video is None:
        return None
    height, width = frame_size(video)
    fps = video.fps if isinstance(video, VideoData) else None
    return ReferenceFacts(num_frames=len(video), height=height, width=width, fps=fps)
