"""Names and shapes of the VAE's tensors in both layouts, and the config told from them."""

import json

import pytest
import torch
from vae_names import diffusers_vae_key

from diffsynth.models.wan_video_vae import WanVideoVAE, vae_config_from_shapes
from diffsynth.models.wan_video_vae_keys import diffusers_vae_key_map

ODD_CONFIGS = [
    {"dim": 4, "z_dim": 4, "dim_mult": (1, 2, 4), "num_res_blocks": 1, "temperal_downsample": (True, True)},
    {"dim": 6, "z_dim": 3, "dim_mult": (1, 2), "num_res_blocks": 3, "temperal_downsample": (True,)},
    {"dim": 4, "z_dim": 5, "dim_mult": (2, 1, 3), "num_res_blocks": 2, "temperal_downsample": (False, False)},
    {"dim": 2, "z_dim": 2, "dim_mult": (3,), "num_res_blocks": 1, "temperal_downsample": ()},
    {
        "dim": 2,
        "z_dim": 2,
        "dim_mult": (1, 1, 2, 2, 2),
        "num_res_blocks": 1,
        "temperal_downsample": (True, False, True, True),
    },
]


def on_meta(**config) -> WanVideoVAE:
    with torch.device("meta"):
        return WanVideoVAE(**config)


def shapes_of(vae: WanVideoVAE) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in vae.state_dict().items()}


def test_the_published_model_has_the_official_names_and_shapes(golden_dir):
    published = json.loads((golden_dir / "wan_vae_t5_keys.json").read_text())["vae"]
    expected = {key: tuple(shape) for key, shape in published["keys"].items()}
    vae = on_meta()
    assert shapes_of(vae) == expected
    assert sum(p.numel() for p in vae.parameters()) == published["parameters"] == 126_892_531
    config = vae_config_from_shapes(expected)
    assert config == {name: tuple(v) if isinstance(v, list) else v for name, v in published["config"].items()
                      if name in config}  # fmt: skip
    assert len(config) == 5
    assert (vae.spatial_factor, vae.temporal_factor, vae.z_dim) == (8, 4, 16)


@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_the_config_can_be_told_from_either_layout(config):
    shapes = shapes_of(on_meta(**config))
    assert vae_config_from_shapes(shapes) == config
    theirs = {diffusers_vae_key(key, config): shape for key, shape in shapes.items()}
    assert len(theirs) == len(shapes)
    names = diffusers_vae_key_map(theirs)
    assert {names[key]: shape for key, shape in theirs.items()} == shapes


def test_diffusers_names_are_those_of_its_own_conversion(golden):
    weights, info = golden("vae_tiny_weights")
    config = vae_config_from_shapes({key: tuple(value.shape) for key, value in weights.items()})
    expected = info["diffusers_key_map"]
    assert {key: diffusers_vae_key(key, config) for key in weights} == expected
    shapes = {theirs: tuple(weights[ours].shape) for ours, theirs in expected.items()}
    assert diffusers_vae_key_map(shapes) == {theirs: ours for ours, theirs in expected.items()}


def test_names_that_are_no_tensor_of_a_vae_are_left_out_of_the_map():
    assert diffusers_vae_key_map({"text_model.embeddings.weight": (1,), "encoder.conv1.weight": (1,)}) == {}
    foreign = ("blocks.0.ffn.0.weight", "encoder.up_blocks.x.resnets.0.gamma", "mid_block.resnets.0.weight")
    assert diffusers_vae_key_map(dict.fromkeys(foreign, (1,))) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv2.weight": None}, "no tensor conv2.weight"),
        ({"encoder.conv1.weight": (4, 12, 3, 3, 3)}, r"must be \[dim, 3, 3, 3, 3\]; got \[4, 12, 3, 3, 3\]"),
        ({"encoder.downsamples.1.residual.6.weight": None}, r"downsamples.1 is neither a residual block nor"),
        (
            {"encoder.downsamples.11.residual.6.weight": (16, 16, 3, 3, 3)},
            r"equally many residual blocks.*\[16, 16, 16\]\]",
        ),
        ({"encoder.downsamples.9.residual.6.weight": (18, 16, 3, 3, 3)}, None),
        ({"encoder.downsamples.10.residual.6.weight": (18, 16, 3, 3, 3)}, "multiples of 4; got widths"),
    ],
)
def test_foreign_tensors_are_not_taken_for_a_vae(change, message):
    shapes = shapes_of(on_meta(dim=4)) | change
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    if message is None:
        assert vae_config_from_shapes(shapes)["dim_mult"] == (1, 2, 4, 4)
        return
    with pytest.raises(ValueError, match=message):
        vae_config_from_shapes(shapes)
