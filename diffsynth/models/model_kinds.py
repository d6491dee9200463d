"""Recognise a set of tensors: DiT, VAE, text or image encoder, under which names, with which arguments.

Kinds are told by names and shapes, so any width and depth loads; official and diffusers names are understood.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix
from pathlib import Path

from torch import nn

from diffsynth.models.checkpoint_files import CheckpointError, StoredTensor
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_keys import dit_config_from_shapes, official_key
from diffsynth.models.wan_video_image_encoder import (
    WanImageEncoder,
    image_encoder_config_from_shapes,
    transformers_to_official,
    unused_names,
)
from diffsynth.models.wan_video_text_encoder import (
    WanTextEncoder,
    text_encoder_config_from_shapes,
    transformers_to_official_key,
)
from diffsynth.models.wan_video_vae import WanVideoVAE, vae_config_from_shapes
from diffsynth.models.wan_video_vae22 import WanVideoVAE22
from diffsynth.models.wan_video_vae_keys import diffusers_vae_key_map

PIECES = "spiece_model"  # the bytes of the tokenizer, in Comfy's files of the text encoder
# The second DiT of a pair, which only its folder or file name tells from the first.
LOW_NOISE_DIT = "wan_video_low_noise_dit"
_EXPERT = re.compile(
    r"((?i:high[-_ ]?noise|[-_ ]high\.\w+$)|(?<![^\W_])HIGH(?![^\W_]))"
    r"|(?i:low[-_ ]?noise|[-_ ]low\.\w+$)|(?<![^\W_])LOW(?![^\W_])|transformer_2/"
)
Shapes = Mapping[str, tuple[int, ...]]
Tensors = Mapping[str, StoredTensor]
Declared = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelKind:
    """One kind of model, and what its files are recognised by."""

    name: str  # as `ModelManager.find` takes it
    factory: Callable[..., nn.Module]  # the class of its models
    official_tensor: str  # name of a tensor that only this kind has
    diffusers_tensor: str  # the same in the other layout
    to_official: Callable[[Tensors], Tensors]  # diffusers names -> official ones; unknown ones stay
    arguments: Callable[[Shapes, Declared], dict]  # official shapes, config.json -> arguments of `factory`
    # Function of the arguments -> how the names begin that files may hold and the model does not take.
    beside: Callable[[dict], tuple[str, ...]] = lambda _: ()  # none by default


def _renamed(rename: Callable[[str], str | None]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(key) or key: tensor for key, tensor in tensors.items()}


def _renamed_vae(tensors: Tensors) -> Tensors:
    names = diffusers_vae_key_map(_shapes(tensors))
    return {names.get(key, key): tensor for key, tensor in tensors.items()}


def _shapes(tensors: Tensors) -> Shapes:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _vae_arguments(shapes: Shapes, declared: Declared) -> dict:
    statistics = {name: declared[name] for name in ("latents_mean", "latents_std") if name in declared}
    return vae_config_from_shapes(shapes) | statistics


_vae_kind = partial(ModelKind, name="wan_video_vae", to_official=_renamed_vae, arguments=_vae_arguments)
KINDS = (
    ModelKind(
        name="wan_video_dit",
        factory=WanModel,
        official_tensor="blocks.0.self_attn.q.weight",
        diffusers_tensor="condition_embedder.time_proj.weight",
        to_official=_renamed(official_key),
        arguments=dit_config_from_shapes,
    ),
    ModelKind(
        name="wan_video_text_encoder",
        factory=WanTextEncoder,
        official_tensor="blocks.0.pos_embedding.embedding.weight",
        diffusers_tensor="encoder.block.0.layer.0.SelfAttention.q.weight",
        to_official=_renamed(transformers_to_official_key),
        arguments=lambda shapes, _: text_encoder_config_from_shapes(shapes),
        # The tokenizer, and the half of UMT5 that writes text.
        beside=lambda _: (PIECES, "decoder.", "lm_head.", "logit_scale"),
    ),
    _vae_kind(
        factory=WanVideoVAE22,
        official_tensor="decoder.upsamples.0.upsamples.0.residual.2.weight",
        diffusers_tensor="encoder.down_blocks.0.resnets.0.conv1.weight",
    ),
    _vae_kind(
        factory=WanVideoVAE,
        official_tensor="decoder.upsamples.0.residual.2.weight",
        diffusers_tensor="decoder.mid_block.resnets.0.conv1.weight",
    ),
    ModelKind(
        name="wan_video_image_encoder",
        factory=WanImageEncoder,
        official_tensor="transformer.0.attn.to_qkv.weight",
        diffusers_tensor="vision_model.encoder.layers.0.self_attn.q_proj.weight",
        to_official=transformers_to_official,
        arguments=image_encoder_config_from_shapes,
        beside=lambda arguments: unused_names(arguments["num_layers"]),
    ),
)


# Names that tell what a file is that holds no model of these kinds; "_" stands for "." in some LoRAs.
_FOREIGN = {
    r"double[._]blocks": "HunyuanVideo or FLUX",
    r"joint[._]blocks": "Stable Diffusion 3",
    r"(input|down)[._]blocks[._]\d+[._](\d|attentions|resnets)|mid_block\.attentions": "Stable Diffusion",
    r"transformer[._]blocks[._]0[._](attn1|norm1|attn[._])": "LTX-Video, CogVideoX or a relative",
    r"vace[._]blocks": "Wan VACE",
    r"visual\.transformer|vision_model\.": "a CLIP image encoder",
    r"text_model\.": "a CLIP text encoder",
}
_LORA = re.compile(r"lora_(A|B|down|up)\b|lokr_w|hada_w")


def foreign_family(names: Iterable[str]) -> str | None:
    """Return the family of models that names of tensors belong to, of the known ones that do not load."""
    text = "\n".join(names)
    return next((family for pattern, family in _FOREIGN.items() if re.search(pattern, text)), None)


def kind_of(tensors: Mapping[str, StoredTensor]) -> ModelKind | None:
    """Return the kind of model that has tensors of these names; None for none."""
    return next((k for k in KINDS if k.official_tensor in tensors or k.diffusers_tensor in tensors), None)


def split(tensors: Mapping[str, StoredTensor]) -> list[dict[str, StoredTensor]]:
    """Return the models that a file holds, each without what stands before all of its names.

    A prefix, "model.diffusion_model." or "first_stage_model.", is told by such a tensor's name behind it.
    What has no model's prefix is left with the model whose prefix is nearest, else with the first.
    """
    names = [name for kind in KINDS for name in (kind.official_tensor, kind.diffusers_tensor)]
    prefixes = {
        key[: -len(name)]: None for name in names for key in tensors if key.endswith(name)
        if key == name or key[-len(name) - 1] == "."
    }  # fmt: skip
    if not prefixes:
        return [dict(tensors)]
    models: dict[str, dict[str, StoredTensor]] = {prefix: {} for prefix in prefixes}
    for key, tensor in tensors.items():
        shared = {p: commonprefix([p, key]).rfind(".") + 1 for p in prefixes}  # noqa: RUF071 - cut at a dot
        prefix = max(prefixes, key=lambda p: (key.startswith(p), shared[p]))
        models[prefix][key[shared[prefix] :]] = tensor
    return list(models.values())


def recognise(
    tensors: Mapping[str, StoredTensor], declared: Declared, source: str
) -> tuple[ModelKind, dict[str, StoredTensor], dict]:
    """Return a model's kind, its tensors under official names, and its arguments.

    Raises:
        CheckpointError: they are no Wan2.1 model, or tensors that tell its size are missing; names `source`.
    """
    hint = "; give all shards in one list, or the folder" if "-of-" in source else ""
    kind = kind_of(tensors)
    if kind is None:
        is_not = f"{source} is not a Wan2.1 DiT, text encoder or VAE"
        if any(_LORA.search(name) for name in tensors):
            raise CheckpointError(f"{is_not}: it is a LoRA; load_lora (--lora) takes it")
        if family := foreign_family(tensors):
            raise CheckpointError(f"{is_not}: its tensors are those of {family}")
        raise CheckpointError(
            f"{is_not}: {len(tensors)} tensors, among them {', '.join(sorted(tensors)[:3]) or 'none'}{hint}"
        )
    is_official = kind.official_tensor in tensors
    if len(tensors[kind.official_tensor if is_official else kind.diffusers_tensor].shape) == 4:
        raise CheckpointError(f"{source} is not a Wan2.1 VAE: it is a VAE for images")
    if not is_official:
        tensors = kind.to_official(tensors)
    try:
        arguments = kind.arguments(_shapes(tensors), declared)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{source} looks like a {kind.name}, but its size cannot be told: {error}{hint}"
        ) from error
    beside = kind.beside(arguments)
    return kind, {key: t for key, t in tensors.items() if not key.startswith(beside)}, arguments


def name_of(kind: ModelKind, file: Path, wanted: Sequence[str] | None = None) -> str:
    """Return a model's name: its kind's, or that of a pair's low-noise expert, if that alone is `wanted`."""
    expert = expert_of(file) or ("low" if list(wanted or ()) == [LOW_NOISE_DIT] else None)
    return LOW_NOISE_DIT if kind.factory is WanModel and expert == "low" else kind.name


def expert_of(file: Path) -> str | None:
    """Return which expert of a pair a file is by its name or its folder's: "high", "low", None if neither."""
    match = _EXPERT.search(f"{file.parent.name}/{file.name}")
    return match and ("high" if match[1] else "low")


def check_complete(model: nn.Module, tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Compare the names and shapes that a model needs with those of its files.

    Raises:
        CheckpointError: with the first five and the count of missing names, unexpected names and wrong
            shapes.
    """
    needed = {key: tensor.shape for key, tensor in model.state_dict().items()}
    wrong = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(shape)}"
        for key, shape in needed.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems = {
        "missing": sorted(needed.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - needed.keys()),
        "of the wrong shape": wrong,
    }
    found = [f"{len(keys)} {what} ({', '.join(keys[:5])})" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{source} does not hold a whole model; tensors: {'; '.join(found)}")
