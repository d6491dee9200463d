"""The CLIP image encoder (ViT-H/14) of Wan2.1's image models, under the official state-dict keys.

It gives the tokens that the last block would read: that block, the last norm, the head and the text tower of
the published file are not part of it.
Axes: B batch, H/W pixel rows and columns, L tokens (class token first), D width, N heads, d head width.
"""

import re
from collections.abc import Mapping
from functools import partial
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.models.attention import attention
from diffsynth.models.checkpoint_files import StoredTensor
from diffsynth.models.names import NAMES

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], as CLIP was trained
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
PUBLISHED_HEAD_DIM = 80
_TRANSFORMERS, _BLOCK = NAMES["image_encoder"]["modules"], NAMES["image_encoder"]["block"]


class ImageAttention(nn.Module):
    """Self-attention over the tokens of a picture [B, L, D]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return self.proj(attention(q, k, v).flatten(2))


class ImageBlock(nn.Module):
    """Norm and attention, norm and feed-forward, each added to its input [B, L, D]."""

    def __init__(self, dim: int, mlp_ratio: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ImageAttention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WanImageEncoder(nn.Module):
    """Pictures to CLIP tokens. `num_layers` counts the last block, which the published files have."""

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 14,
        dim: int = 1280,
        mlp_ratio: int = 4,
        num_heads: int = 16,
        num_layers: int = 32,
    ) -> None:
        super().__init__()
        if dim % num_heads or image_size % patch_size:
            raise ValueError(
                "dim must be a multiple of num_heads and image_size of patch_size; "
                f"got {dim}, {num_heads}, {image_size}, {patch_size}"
            )
        self.image_size, self.dim = image_size, dim
        self.unused = unused_names(num_layers)
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=False)
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, dim) / dim**0.5)
        self.pos_embedding = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, dim) / dim**0.5)
        self.pre_norm = nn.LayerNorm(dim)
        self.transformer = nn.Sequential(
            *(ImageBlock(dim, mlp_ratio, num_heads) for _ in range(num_layers - 1))
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the tokens [B, L, D] of pictures [B, 3, H, W] in [-1, 1], squeezed to a square.

        The resize is bicubic and without antialiasing, as the image models were trained.
        """
        weight = self.patch_embedding.weight
        mean, std = torch.tensor([PIXEL_MEAN, PIXEL_STD], device=weight.device)[..., None, None]
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(images.to(weight.device).float(), size, mode="bicubic", align_corners=False)
        pixels = ((pixels / 2 + 0.5 - mean) / std).to(weight.dtype)
        tokens = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_embedding.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.transformer(self.pre_norm(tokens + self.pos_embedding))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights by their official names, with or without "visual."; those not used are skipped."""
        names = {key.removeprefix("visual."): key for key in state_dict}
        found = {name: state_dict[key] for name, key in names.items() if not name.startswith(self.unused)}
        return super().load_state_dict(found, strict, assign)


def unused_names(num_layers: int) -> tuple[str, ...]:
    """Return how the official names begin of published tensors that the encoder does not use."""
    of_text = "textual.", "log_scale", "text_model.", "text_projection.", "logit_scale"
    return *of_text, "post_norm.", "head", "vision_model.", f"transformer.{num_layers - 1}."


def image_encoder_config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], declared: Mapping[str, Any]
) -> dict:
    """Return the arguments of `WanImageEncoder` that official names and shapes of tensors tell.

    Shapes do not tell the number of heads: it comes from `declared`, the config.json of the transformers
    layout, else heads are 80 wide, as in the published model.
    """
    dim, _, patch_size, _ = shapes["patch_embedding.weight"]
    blocks = {int(match[1]) for key in shapes if (match := re.match(r"transformer\.(\d+)\.", key))}
    return {
        "image_size": isqrt(shapes["pos_embedding"][1] - 1) * patch_size,
        "patch_size": patch_size,
        "dim": dim,
        "mlp_ratio": shapes["transformer.0.mlp.0.weight"][0] // dim,
        "num_heads": declared.get("num_attention_heads", max(dim // PUBLISHED_HEAD_DIM, 1)),
        "num_layers": max(blocks) + 1,
    }


def transformers_to_official(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of transformers' CLIP vision model as the official ones; others keep their names."""
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        path, _, kind = key.rpartition(".")
        block = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", path)
        if key in _TRANSFORMERS:
            shape = torch.Size([1] * (3 - len(tensor.shape)) + list(tensor.shape))
            found[_TRANSFORMERS[key]] = StoredTensor(tensor.file, shape, partial(_joined, [tensor], shape))
        elif block is None:
            found[f"{_TRANSFORMERS.get(path, path)}.{kind}".removeprefix(".")] = tensor
        elif block[2] == "self_attn.q_proj":
            parts = [tensors[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            shape = torch.Size([3 * tensor.shape[0], *tensor.shape[1:]])
            name = f"transformer.{block[1]}.attn.to_qkv.{kind}"
            found[name] = StoredTensor(tensor.file, shape, partial(_joined, parts, shape))
        elif block[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            found[f"transformer.{block[1]}.{_BLOCK.get(block[2], block[2])}.{kind}"] = tensor
    return found


def _joined(parts: list[StoredTensor], shape: torch.Size) -> Tensor:
    return torch.cat([part.read() for part in parts]).reshape(shape)
