"""Names of the VAE's tensors in the diffusers layout, by rule, for any width and depth."""

import re
from collections.abc import Mapping

from diffsynth.models.names import NAMES

# Paths that are in no table are the same in both layouts.
_TOP, _HALF, _RESIDUAL = (NAMES["vae"][part] for part in ("modules", "half", "residual"))
# A name is [half.] module [. inner path] . tensor
_NAME = re.compile(
    r"(?:(?P<half>encoder|decoder)\.)?(?P<module>quant_conv|post_quant_conv|conv_in|conv_out|norm_out|"
    r"mid_block\.(?:resnets|attentions)\.\d+|(?:down|up)_blocks\.\d+\.(?:resnets\.\d+|downsampler|upsampler"
    r"|upsamplers\.\d+)|down_blocks\.\d+)(?:\.(?P<inner>.+))?\.(?P<tensor>weight|bias|gamma)"
)
_IN_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|.+)")


def diffusers_vae_key_map(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return {diffusers name: official name} of the tensors of a whole VAE in the diffusers layout.

    Names that are not understood are left out, so that a file of another layout gives few or none.
    """
    found = (re.match(r"(?:en|de)coder\.(down|up)_blocks\.0\.resnets\.(\d+)\.", key) for key in shapes)
    # Residual blocks of a level; "down" is there in Wan2.2's VAE only.
    num_resnets: dict[str, int] = {}
    for kind, index in (match.groups() for match in found if match):
        num_resnets[kind] = max(num_resnets.get(kind, 0), int(index) + 1)
    official = {key: _official_key(match, num_resnets) for key in shapes if (match := _NAME.fullmatch(key))}
    return {key: name for key, name in official.items() if name is not None}


def _official_key(name: re.Match[str], num_resnets: Mapping[str, int]) -> str | None:
    half, module, inner, tensor = name.group("half", "module", "inner", "tensor")
    if half is None:
        module = _TOP.get(module)
    elif in_level := _IN_LEVEL.fullmatch(module):
        kind, level, resnet = in_level.groups()
        # The resampling stands after the residual blocks of its level.
        place = num_resnets.get(kind, 0) if resnet is None else int(resnet)
        if "down" in num_resnets:
            module = f"{kind}samples.{level}.{kind}samples.{place}"
        else:  # all levels in one list
            module = f"{kind}samples.{int(level) * (num_resnets[kind] + 1) + place}"
    elif module.startswith("down_blocks."):
        module = module.replace("down_blocks", "downsamples")
    else:
        module = _HALF.get(module)
    if module is None:
        return None
    return ".".join(part for part in (half, module, _RESIDUAL.get(inner, inner), tensor) if part)
