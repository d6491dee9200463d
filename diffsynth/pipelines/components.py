"""The models of a pipeline, and where they are."""

from dataclasses import dataclass

import torch

from diffsynth.configs.resolve import ModelFacts
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.prompters import WanPrompter
from diffsynth.vram_management import Residency


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

    def facts(self) -> ModelFacts:
        """Return what resolving the options of a run needs to know."""
        rows, cols = (self.vae.spatial_factor * side for side in self.dit.patch_size[1:])
        return ModelFacts(dim=self.dit.dim, num_layers=self.dit.num_layers, pixels_per_token=(rows, cols))
