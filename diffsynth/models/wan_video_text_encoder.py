"""UMT5 text encoder of Wan2.1: transformers' UMT5EncoderModel under the official tensor names.

Token ids become the rows that the DiT's cross-attention reads. Every layer has its own relative position
bias; scores are not scaled. Attention is transformers' eager one, which computes what the official code
computes bit for bit in float32, and whose softmax accumulates in float32 in half types too.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffsynth.models.names import NAMES
from diffsynth.models.packed_linear import Model

MAX_DISTANCE = 128  # tokens; longer distances share the last position bucket
NORM_EPS = 1e-6

_TOP, _BLOCK = NAMES["text_encoder"]["modules"], NAMES["text_encoder"]["block"]
_BLOCK_PATH = re.compile(r"encoder\.block\.(\d+)\.(.+)")


def transformers_to_official_key(key: str) -> str | None:
    """Return the official name of a tensor of transformers' UMT5EncoderModel; None if it is not one.

    `shared.weight` and its other name `encoder.embed_tokens.weight` give the same official name.
    """
    path, _, tensor = key.rpartition(".")
    block = _BLOCK_PATH.fullmatch(path)
    module = _TOP.get(path) if block is None else _BLOCK.get(block[2])
    if module is None:
        return None
    return f"{module}.{tensor}" if block is None else f"blocks.{block[1]}.{module}.{tensor}"


def text_encoder_config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the arguments of `WanTextEncoder` that official names and shapes of tensors tell."""
    names = ("token_embedding", *(f"blocks.0.{n}" for n in ("attn.q", "ffn.fc1", "pos_embedding.embedding")))
    needed = [f"{name}.weight" for name in names]
    if unusable := [key for key in needed if len(shapes.get(key, ())) != 2]:
        raise ValueError(f"not a UMT5 encoder: no matrix {', '.join(unusable)}")
    (vocab, dim), (dim_attn, _), (dim_ffn, _), (num_buckets, num_heads) = (shapes[key] for key in needed)
    blocks = {int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))}
    return {
        "vocab": vocab,
        "dim": dim,
        "dim_attn": dim_attn,
        "dim_ffn": dim_ffn,
        "num_heads": num_heads,
        "num_layers": max(blocks) + 1,
        "num_buckets": num_buckets,
    }


class WanTextEncoder(Model):
    """UMT5 encoder; the default sizes are those of umt5-xxl.

    Weights load and save under the official names. Built under `torch.device("meta")` and loaded with
    `assign=True`, it takes the tensors themselves and makes no copy. It has no dropout and starts in eval
    mode.

    Raises:
        ValueError: a size is not positive, or dim_attn is not a multiple of num_heads.
    """

    def __init__(
        self,
        vocab: int = 256384,
        dim: int = 4096,
        dim_attn: int = 4096,
        dim_ffn: int = 10240,
        num_heads: int = 64,
        num_layers: int = 24,
        num_buckets: int = 32,
    ) -> None:
        names = ("vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers")
        for name, size in zip(names, (vocab, dim, dim_attn, dim_ffn, num_heads, num_layers), strict=True):
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        if dim_attn % num_heads:
            raise ValueError(f"dim_attn must be a multiple of num_heads={num_heads}; got {dim_attn}")
        if num_buckets < 4 or num_buckets % 4:
            raise ValueError(f"num_buckets must be a positive multiple of 4; got {num_buckets}")
        from transformers import UMT5Config, UMT5EncoderModel

        super().__init__()
        self.vocab, self.dim = vocab, dim
        config = UMT5Config(
            vocab_size=vocab,
            d_model=dim,
            d_kv=dim_attn // num_heads,
            d_ff=dim_ffn,
            num_heads=num_heads,
            num_layers=num_layers,
            relative_attention_num_buckets=num_buckets,
            relative_attention_max_distance=MAX_DISTANCE,
            layer_norm_epsilon=NORM_EPS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
        config._attn_implementation = "eager"
        # The stack alone: around it is only a second name of the embedding, which would have to be kept tied.
        self.encoder = UMT5EncoderModel(config).encoder
        self.num_loads = 0
        self.eval()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode ids [B, L] -> [B, L, dim]; ValueError for another shape.

        The mask [B, L] is 1 where ids are real, None where all are, and 0 at padding, whose rows are computed
        like any other and mean nothing.
        """
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be [B, L] with L at least 1; got shape {tuple(ids.shape)}")
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.shape != ids.shape:
            raise ValueError(f"mask must have the shape of ids, {tuple(ids.shape)}; got {tuple(mask.shape)}")
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state

    @staticmethod
    def official_key(key: str) -> str:
        """Return the official name of a tensor, by its path in this module."""
        official = transformers_to_official_key(f"encoder.{key.removeprefix('encoder.')}")
        assert official is not None, key
        return official

    def state_dict(  # type: ignore[override]  # the base also has a deprecated positional form
        self, *, destination: dict[str, Tensor] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        """Return the weights under their official names; arguments are those of `torch.nn.Module`."""
        destination = {} if destination is None else destination
        state = self.encoder.state_dict(keep_vars=keep_vars)
        destination.update({prefix + self.official_key(key): value for key, value in state.items()})
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights by their official names; arguments are those of `torch.nn.Module`.

        Each call counts up `num_loads`, by which caches of results notice new weights.

        Raises:
            RuntimeError: before anything is changed, for a wrong shape and, if strict, for other names.
        """
        own = self.state_dict()
        missing = [key for key in own if key not in state_dict]
        unexpected = [key for key in state_dict if key not in own]
        problems = [
            f"{key} has shape {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in state_dict and state_dict[key].shape != value.shape
        ]
        names = {"missing": missing, "unexpected": unexpected} if strict else {}
        problems += [f"{what}: {', '.join(keys)}" for what, keys in names.items() if keys]
        if problems:
            raise RuntimeError(f"these are not the weights of this WanTextEncoder: {'; '.join(problems)}")
        stack_keys = {self.official_key(key): key for key in self.encoder.state_dict()}
        found = {stack_keys[key]: value for key, value in state_dict.items() if key in own}
        result = self.encoder.load_state_dict(found, strict=False, assign=assign)
        self.num_loads += 1
        return result._replace(missing_keys=missing, unexpected_keys=unexpected)
