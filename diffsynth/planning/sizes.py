"""Sizes of the models and the bytes of their weights, from which plans are computed."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from inspect import signature
from typing import cast

import torch
from torch import nn

from diffsynth.configs.checkpoints import PUBLISHED
from diffsynth.configs.resolve import ModelFacts
from diffsynth.models.packed_linear import PACKED_DTYPES, PackedLinear, pack_block_linears
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_image_encoder import WanImageEncoder
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.models.wan_video_vae22 import WanVideoVAE22
from diffsynth.vram_management.streaming import tensors_of

PICTURE_TOKENS = 257  # that CLIP makes of a picture


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBytes:
    """Bytes of a model's weights: of its repeated blocks, one number each, and of all the rest."""

    blocks: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        return sum(self.blocks) + self.rest

    def streamed(self, num_resident_blocks: int = 0) -> int:
        """Return the bytes on the device while blocks stream: the rest, the resident blocks, and two buffers
        of the largest block for those that stream.
        """
        buffers = 2 * max(self.blocks) if num_resident_blocks < len(self.blocks) else 0
        return self.rest + sum(self.blocks[:num_resident_blocks]) + buffers


@dataclass(frozen=True, kw_only=True, slots=True)
class DiTSize:
    """The arguments of `WanModel` that decide its cost, its dtype, and its weights."""

    dim: int  # width of a token
    ffn_dim: int  # width inside the feed-forward layers
    num_heads: int  # attention heads
    num_layers: int  # blocks
    in_dim: int  # channels of the input
    out_dim: int  # channels of the output
    text_dim: int  # width of the text encoder's rows
    freq_dim: int  # width of the timestep's sinusoidal embedding
    text_len: int  # rows of text
    patch_size: tuple[int, int, int]  # latent (frames, rows, columns) in a token
    dtype: torch.dtype  # of the computation
    weights: WeightBytes  # bytes of the weights
    block_parameters: int  # numbers in the weights of one block
    context_len: int  # tokens of the text and of pictures
    has_clean_first_frame: bool  # the first latent frame may be a picture's, as in TI2V
    widened: int = 0  # bytes of the widest matrix when unpacked from eight bits; 0 for other weights

    @classmethod
    def of(cls, dit: WanModel) -> "DiTSize":
        """Return the sizes of a DiT."""
        packed = any(isinstance(module, PackedLinear) for module in dit.blocks.modules())
        names = {field.name for field in fields(cls)}
        return cls(
            **{name: getattr(dit, name) for name in names if hasattr(dit, name)},
            weights=_bytes_of(dit, dit.blocks),
            block_parameters=_parameters(dit.blocks[0]),
            context_len=dit.text_len + (dit.image_positions or PICTURE_TOKENS * dit.has_image_input),
            widened=dit.dim * dit.ffn_dim * dit.dtype.itemsize if packed else 0,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderSize:
    """Heads of the text encoder and its weights."""

    num_heads: int
    weights: WeightBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class VAESize:
    """Layout of the VAE, as its attributes tell it, and its weights."""

    z_dim: int
    spatial_factor: int
    widths: tuple[int, ...]
    decoder_widths: tuple[int, ...]
    num_res_blocks: int
    temporal: tuple[bool, ...]
    dtype: torch.dtype
    patch: int
    weights: int

    @classmethod
    def of(cls, vae: WanVideoVAE) -> "VAESize":
        """Return the sizes of a loaded VAE."""
        names = [field.name for field in fields(cls) if hasattr(vae, field.name)]
        return cls(
            **{name: getattr(vae, name) for name in names}, patch=vae.encoder.patch, weights=_bytes(vae)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """A name, and the sizes of a pipeline's models, of one DiT of two; bytes of the image encoder."""

    name: str
    dit: DiTSize
    text_encoder: TextEncoderSize
    vae: VAESize
    image_encoder: int = 0

    @classmethod
    def of(cls, models: Mapping[str, nn.Module]) -> "ModelSizes":
        """Return the sizes of loaded models: "dit", "text_encoder", "vae" and, if any, "image_encoder"."""
        dit = cast(WanModel, models["dit"])
        text_encoder = cast(WanTextEncoder, models["text_encoder"])
        encoder = text_encoder.encoder
        return cls(
            name=f"DiT of width {dit.dim}, {dit.num_layers} blocks",
            dit=DiTSize.of(dit),
            text_encoder=TextEncoderSize(
                num_heads=encoder.config.num_heads, weights=_bytes_of(text_encoder, encoder.block)
            ),
            vae=VAESize.of(cast(WanVideoVAE, models["vae"])),
            image_encoder=_bytes(models["image_encoder"]) if "image_encoder" in models else 0,
        )

    @property
    def takes_picture(self) -> bool:
        """Return whether the video may begin with a picture."""
        return self.dit.has_clean_first_frame or self.vae.patch > 1 or self.dit.in_dim > self.dit.out_dim

    def facts(self) -> ModelFacts:
        """Return the facts that decide options of a run."""
        factor = self.vae.spatial_factor
        rows, cols = (factor * side for side in self.dit.patch_size[1:])
        return ModelFacts(
            dim=self.dit.dim,
            num_layers=self.dit.num_layers,
            num_heads=self.dit.num_heads,
            pixels_per_token=(rows, cols),
            pixels_per_latent=factor,
            frames_per_latent=2 ** sum(self.vae.temporal),
        )

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a video in pixels; sides are rounded up to whole tokens."""
        frames = -(-(num_frames - 1) // 2 ** sum(self.vae.temporal)) + 1
        factor = self.vae.spatial_factor
        rows, cols = (
            -(-side // (factor * patch)) * patch
            for side, patch in zip((height, width), self.dit.patch_size[1:], strict=True)
        )
        return frames, rows, cols


@lru_cache(maxsize=8)
def published_sizes(name: str, torch_dtype: torch.dtype = torch.bfloat16) -> ModelSizes:
    """Return the sizes of a published checkpoint, a key of `PUBLISHED`; none of its files is needed."""
    if name not in PUBLISHED:
        raise ValueError(f"model must be one of {', '.join(PUBLISHED)}; got {name!r}")
    with torch.device("meta"):
        dit = WanModel(**PUBLISHED[name].dit_kwargs)
        vae = WanVideoVAE22() if dit.out_dim == 48 else WanVideoVAE()
        clip = _parameters(WanImageEncoder()) if dit.has_image_input else 0
        compute = torch.bfloat16 if torch_dtype in PACKED_DTYPES else torch_dtype
        if torch_dtype in PACKED_DTYPES:
            pack_block_linears(dit, torch_dtype)
    # umt5-xxl, the text encoder of every published checkpoint.
    t5 = {name: argument.default for name, argument in signature(WanTextEncoder).parameters.items()}
    matrices = 4 * t5["dim"] * t5["dim_attn"] + 3 * t5["dim"] * t5["dim_ffn"]
    small = 2 * t5["dim"] + t5["num_buckets"] * t5["num_heads"]
    block = matrices * torch_dtype.itemsize + small * compute.itemsize
    return ModelSizes(
        name=PUBLISHED[name].name,
        dit=DiTSize.of(dit.to(compute)),
        text_encoder=TextEncoderSize(
            num_heads=t5["num_heads"],
            weights=WeightBytes(
                blocks=(block,) * t5["num_layers"], rest=(t5["vocab"] + 1) * t5["dim"] * compute.itemsize
            ),
        ),
        vae=VAESize.of(vae),
        image_encoder=clip * compute.itemsize,
    )


def _parameters(module: nn.Module) -> int:
    return sum(t.numel() for t in tensors_of(module))  # packed weights are buffers


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(module))


def _bytes_of(model: nn.Module, blocks: nn.ModuleList) -> WeightBytes:
    sizes = tuple(_bytes(block) for block in blocks)
    return WeightBytes(blocks=sizes, rest=_bytes(model) - sum(sizes))
