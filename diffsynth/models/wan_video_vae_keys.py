"""Names of the VAE's tensors in the diffusers layout, by rule, for any width and depth."""

import re
from collections.abc import Mapping

# Module paths, official -> diffusers. Paths that are in no table are the same in both.
_TOP = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_HALF = {
    "conv1": "conv_in",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
    "head.0": "norm_out",
    "head.2": "conv_out",
}
_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
# A name is [half.] module [. inner path] . tensor
_OFFICIAL = re.compile(
    r"(?:(?P<half>encoder|decoder)\.)?(?P<module>conv\d|(?:middle|head|downsamples|upsamples)\.\d+)"
    r"(?:\.(?P<inner>.+))?\.(?P<tensor>weight|bias|gamma)"
)
_DIFFUSERS = re.compile(
    r"(?:(?P<half>encoder|decoder)\.)?(?P<module>quant_conv|post_quant_conv|conv_in|conv_out|norm_out|"
    r"mid_block\.(?:resnets|attentions)\.\d+|down_blocks\.\d+|up_blocks\.\d+\.(?:resnets|upsamplers)\.\d+)"
    r"(?:\.(?P<inner>.+))?\.(?P<tensor>weight|bias|gamma)"
)
_UP_BLOCK = re.compile(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)")


def diffusers_vae_key(official_key: str, config: Mapping[str, object]) -> str:
    """The diffusers name of a tensor.

    config: arguments of `WanVideoVAE`, as from `vae_config_from_shapes`. Raises ValueError if the name is
    none of a Wan VAE.
    """
    match = _OFFICIAL.fullmatch(official_key)
    if match is None:
        raise ValueError(f"{official_key!r} is no tensor of a Wan VAE")
    half, module, inner, tensor = match.group("half", "module", "inner", "tensor")
    kind, _, index = module.partition(".")
    if half is None:
        module = _TOP.get(module)
    elif (half, kind) == ("encoder", "downsamples"):
        module = f"down_blocks.{index}"
    elif (half, kind) == ("decoder", "upsamples"):
        # A level of the decoder is one residual block more than in the encoder, then the upsampler.
        num_resnets = config["num_res_blocks"] + 1
        level, place = divmod(int(index), num_resnets + 1)
        part = "upsamplers.0" if place == num_resnets else f"resnets.{place}"
        module = f"up_blocks.{level}.{part}"
    else:
        module = _HALF.get(module)
    if module is None:
        raise ValueError(f"{official_key!r} is no tensor of a Wan VAE")
    return ".".join(part for part in (half, module, _RESIDUAL.get(inner, inner), tensor) if part)


def diffusers_vae_key_map(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """{diffusers name: official name} of the tensors of a whole VAE in the diffusers layout.

    Names that are not understood are left out, so that a file of another layout gives few or none.
    """
    first_level = {
        match[1] for key in shapes if (match := re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", key))
    }
    official = {key: _official_key(key, len(first_level)) for key in shapes}
    return {key: name for key, name in official.items() if name is not None}


def _official_key(diffusers_key: str, num_resnets: int) -> str | None:
    match = _DIFFUSERS.fullmatch(diffusers_key)
    if match is None:
        return None
    half, module, inner, tensor = match.group("half", "module", "inner", "tensor")
    if half is None:
        module = _inverse(_TOP).get(module)
    elif module.startswith("down_blocks."):
        module = module.replace("down_blocks", "downsamples")
    elif up_block := _UP_BLOCK.fullmatch(module):
        level, part, place = int(up_block[1]), up_block[2], int(up_block[3])
        place = num_resnets if part == "upsamplers" else place
        module = f"upsamples.{level * (num_resnets + 1) + place}"
    else:
        module = _inverse(_HALF).get(module)
    if module is None:
        return None
    return ".".join(part for part in (half, module, _inverse(_RESIDUAL).get(inner, inner), tensor) if part)


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}
