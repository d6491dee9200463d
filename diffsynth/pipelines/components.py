"""The models of a pipeline, how they are loaded and where they are; facts of models and videos for a run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.configs.defaults import run_defaults
from diffsynth.configs.resolve import ModelFacts, ReferenceFacts
from diffsynth.data import VideoData
from diffsynth.data.frames import Picture, read_picture
from diffsynth.data.tensors import Video, frame_size
from diffsynth.models.checkpoint_files import DOWNLOAD_HINT
from diffsynth.models.model_kinds import KINDS, LOW_NOISE_DIT, expert_of
from diffsynth.models.model_manager import LoadedModel, ModelManager, check_dtype
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_image_encoder import WanImageEncoder
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.planning.sizes import ModelSizes
from diffsynth.prompters import WanPrompter
from diffsynth.prompters.tokenizer import WanTokenizer, find_tokenizer, load_tokenizer, tokenizer_from_pieces
from diffsynth.vram_management import Residency, choose_device, choose_dtype

REQUIRED = ("wan_video_dit", "wan_video_text_encoder", "wan_video_vae")
# What models can compute in; eight bits are for storage.
WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """The models and the prompter of a pipeline.

    Attributes:
        dit, low_noise_dit: the DiT, or the high-noise expert of two and the other one.
        text_encoder, vae, prompter: the other models of every pipeline, and what encodes prompts.
        residency: brings models to the compute device.
        image_encoder: CLIP encoder of the models that read pictures through it, else None.

    Raises:
        ValueError: the models do not belong together.
    """

    dit: WanModel
    text_encoder: WanTextEncoder
    vae: WanVideoVAE
    prompter: WanPrompter
    residency: Residency
    low_noise_dit: WanModel | None = None
    image_encoder: WanImageEncoder | None = None

    def __post_init__(self) -> None:
        dit, z_dim = self.dit, self.vae.z_dim
        if dit.out_dim != z_dim or dit.in_dim not in (z_dim, 2 * z_dim + self.vae.temporal_factor):
            raise ValueError(
                f"the DiT has in_dim={dit.in_dim}, out_dim={dit.out_dim}, which are not those of a VAE with "
                f"{z_dim} channels"
            )
        if dit.has_image_input and self.image_encoder is None:
            raise ValueError("the DiT reads pictures through CLIP, but no image encoder is loaded")
        low = self.low_noise_dit
        if low is not None and (low.in_dim, low.dim, low.text_dim) != (dit.in_dim, dit.dim, dit.text_dim):
            raise ValueError("the low-noise and the high-noise expert are of two different models")
        if dit.text_dim != (width := self.text_encoder.dim):
            raise ValueError(f"the DiT takes text of width {dit.text_dim}, the text encoder gives {width}")

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the DiTs here, the high-noise one first."""
        return ("dit",) if self.low_noise_dit is None else ("dit", "low_noise_dit")

    @property
    def device(self) -> torch.device:
        """The compute device."""
        return self.residency.device

    @torch.inference_mode(False)
    def to(
        self, device: str | torch.device | torch.dtype | None = None, torch_dtype: torch.dtype | None = None
    ) -> "Components":
        """Return the models on another device, or all but the VAE in another dtype, which may come alone."""
        if isinstance(device, torch.dtype):
            device, torch_dtype = None, device
        if torch_dtype is not None:
            check_dtype(torch_dtype, WIDE_DTYPES)
            for name, model in self.residency.models.items():
                if name != "vae":
                    model.to(torch_dtype)
        if device is None:
            return self
        self.residency.stop_streaming()
        residency = Residency(self.residency.models, choose_device(device))
        residency.offload, residency.settled = self.residency.offload, self.residency.settled
        return replace(self, residency=residency)

    def facts(self) -> ModelFacts:
        """Return the facts about the models that decide options of a run."""
        facts = ModelSizes.of(self.residency.models).facts()
        boundary = 0.9 if self.dit.in_dim > self.dit.out_dim else 0.875  # as published, of two experts
        return facts if self.low_noise_dit is None else replace(facts, boundary=boundary)

    @property
    def takes_picture(self) -> bool:
        """Return whether the video may begin with a picture."""
        return ModelSizes.of(self.residency.models).takes_picture

    def read_pictures(self, input_image: Picture | None, end_image: Picture | None) -> dict[str, Image.Image]:
        """Return those given, by argument; ValueError if the model needs another or does not take one."""
        needs, has_positions = self.dit.in_dim > self.dit.out_dim, self.dit.image_positions > 0
        takes_last = needs and (has_positions or not self.dit.has_image_input)
        pictures = {}
        for name, picture, needed, taken in (
            ("input_image", input_image, needs, self.takes_picture),
            ("end_image", end_image, has_positions, takes_last),
        ):
            if needed and picture is None:
                raise ValueError(f"this model continues pictures and needs {name}; none is given")
            if picture is not None and not taken:
                raise ValueError(f"this model takes no {name}; see docs/weights.md for those that do")
            if picture is not None:
                pictures[name] = read_picture(picture, name)
        return pictures


def load_checkpoint(
    path: str | Path,
    device: torch.device,
    torch_dtype: torch.dtype | None,
    vae_dtype: torch.dtype,
    loras: Mapping[str, float] | Mapping[Path, float],
    parts: Mapping[str, str | Path],
) -> ModelManager:
    """Load the models of a checkpoint folder, or of a name as for `from_pretrained`, and LoRAs.

    Raises:
        TypeError: parts has another name.
        FileNotFoundError: a file is missing.
        CheckpointError: a file is damaged or of another kind.
    """
    folder = checkpoint_folder(path)
    for file in loras:
        if not Path(file).is_file():
            raise FileNotFoundError(f"LoRA {file} does not exist")
    if torch_dtype is None and (declared := run_defaults(folder)["dtype"]) is not None:
        torch_dtype = getattr(torch, declared)
    torch_dtype = choose_dtype(device, torch_dtype)
    manager = ModelManager(torch_dtype=torch_dtype)
    names = dict.fromkeys([*(kind.name for kind in KINDS), LOW_NOISE_DIT])
    kinds = {name.removeprefix("wan_video_"): name for name in names}
    if unknown := sorted(parts.keys() - kinds.keys()):
        raise TypeError(f"weights can be given for {', '.join(kinds)}; got {', '.join(unknown)}")
    wanted = [kind for name, kind in kinds.items() if name not in parts]
    if torch_dtype == torch.float16 and (text := kinds["text_encoder"]) in wanted:  # UMT5 overflows in it
        wanted.remove(text)
        manager.load_models([folder], torch_dtype=torch.float32, model_names=[text])
    if not set(REQUIRED).isdisjoint(wanted):
        manager.load_models([folder], vae_dtype=vae_dtype, model_names=wanted)
    for name, file in parts.items():
        manager.load_models([file], vae_dtype=vae_dtype, model_names=[kinds[name]])
    found = {model.name for model in manager.loaded}
    if missing := ", ".join(sorted(set(REQUIRED) - found)):
        pair = "; the low-noise expert is one of two" if LOW_NOISE_DIT in found else ""
        raise FileNotFoundError(f"{folder} lacks the weights of {missing}{pair}; {DOWNLOAD_HINT}")
    for file, strength in loras.items():
        manager.load_lora(file, strength)
    return manager


def models_of(manager: ModelManager) -> dict[str, LoadedModel]:
    """Return the loaded models of a pipeline by their names in `Components`."""
    names = dict.fromkeys([*REQUIRED, *(entry.name for entry in manager.loaded)])
    found = {name.removeprefix("wan_video_"): manager.find(name) for name in names}
    if expert_of(found["dit"].files[0]) == "high" and "low_noise_dit" not in found:
        raise ValueError(f"{found['dit'].files[0]} is one of two experts; load the low-noise one as well")
    return found


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
    """Return number, size and rate of the frames of a reference video; None without one."""
    if video is None:
        return None
    height, width = frame_size(video)
    fps = video.fps if isinstance(video, VideoData) else None
    return ReferenceFacts(num_frames=len(video), height=height, width=width, fps=fps)
