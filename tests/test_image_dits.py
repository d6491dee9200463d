"""The DiTs of image models and of Wan2.2 against golden tensors of the official code."""

import json

import pytest
import torch

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_keys import dit_config_from_shapes, official_key

CLOSE = {"atol": 2e-5, "rtol": 0}
TI2V_CASES = ["scalar", "first_frame_clean", "per_frame", "per_token"]
PUBLISHED = {
    "Wan2.1-I2V-14B-480P/720P": ("Wan2.1-I2V-14B", {"image_dim": 1280, "image_positions": 0}),
    "Wan2.1-FLF2V-14B-720P": ("Wan2.1-I2V-14B", {"image_dim": 1280, "image_positions": 514}),
    "Wan2.2-T2V-A14B, each expert": ("Wan2.1-T2V-14B", {}),
    "Wan2.2-I2V-A14B, each expert": ("Wan2.1-T2V-14B", {}),
    "Wan2.2-TI2V-5B": ("Wan2.1-T2V-1.3B", {}),
}


@pytest.fixture(scope="module")
def load(golden):
    """A function: name of a golden file -> (DiT, tensors, description)."""

    def build(name):
        tensors, info = golden(name)
        weights = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        dit = WanModel(**dit_config_from_shapes(shapes, info["config"])).eval().requires_grad_(False)
        dit.load_state_dict(weights)
        return dit, tensors, info

    return build


@pytest.mark.parametrize("name", ["dit_i2v_tiny", "dit_flf2v_tiny"])
@pytest.mark.parametrize("index", [0, 1])
def test_an_image_dit_gives_the_official_velocity_and_features(load, name, index):
    dit, g, info = load(name)
    inputs = g["in.latents"], g["in.timesteps"][index : index + 1], g["in.context"]
    condition = {"clip_feature": g["in.clip_feature"], "y": g["in.y"]}
    torch.testing.assert_close(dit(*inputs, **condition), g[f"t{index}.velocity"], **CLOSE)
    q, k = dit.features(*inputs, block=info["captured_block"], **condition)
    torch.testing.assert_close(q.flatten(1, 3)[0], g[f"t{index}.block_q"], **CLOSE)
    torch.testing.assert_close(k.flatten(1, 3)[0], g[f"t{index}.block_k"], **CLOSE)
    torch.testing.assert_close(dit.embed(*inputs, **condition).image_context, g["image_context"], **CLOSE)


@pytest.mark.parametrize("case", TI2V_CASES)
def test_timesteps_of_frames_and_tokens_give_the_official_velocity(load, case):
    dit, g, info = load("dit_ti2v_tiny")
    for name in (f"{case}.timestep", f"{case}.timestep_per_frame"):
        if name not in g:
            continue
        batch = len(g[name])
        inputs = g["in.latents"][:batch], g[name], g["in.context"][:batch]
        torch.testing.assert_close(dit(*inputs), g[f"{case}.velocity"], **CLOSE)
        q, k = dit.features(*inputs, block=info["captured_block"])
        torch.testing.assert_close(q.flatten(1, 3), g[f"{case}.block_q"], **CLOSE)
        torch.testing.assert_close(k.flatten(1, 3), g[f"{case}.block_k"], **CLOSE)


def test_frames_of_different_timesteps_are_embedded_once_a_frame(load):
    dit, g, _ = load("dit_ti2v_tiny")
    timestep = g["first_frame_clean.timestep_per_frame"]
    state = dit.embed(g["in.latents"][:1], timestep, g["in.context"][:1])
    torch.testing.assert_close(state.time[0], g["time_embedding_per_frame"], **CLOSE)
    torch.testing.assert_close(state.modulation[0], g["time_projection_per_frame"], **CLOSE)


def test_equal_timesteps_of_all_frames_give_the_bits_of_one_timestep(load):
    dit, g, _ = load("dit_ti2v_tiny")
    x, context = g["in.latents"][:1], g["in.context"][:1]
    one = dit(x, g["scalar.timestep"], context)
    torch.testing.assert_close(dit(x, g["scalar.timestep"].expand(1, 3), context), one, atol=2e-6, rtol=0)
    with pytest.raises(ValueError, match=r"timestep must be \[B\] or \[B, 3 or 18\]; got \(1, 2\)"):
        dit(x, torch.zeros(1, 2), context)


@pytest.mark.parametrize("name", ["dit_i2v_tiny", "dit_flf2v_tiny", "dit_ti2v_tiny"])
def test_diffusers_names_are_understood(golden, name):
    for ours, theirs in golden(name)[1]["diffusers_key_map"].items():
        assert official_key(theirs) == ours


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_dits_have_exactly_the_official_names_and_shapes(golden_dir, model):
    entry = json.loads((golden_dir / "wan_family_keys.json").read_text())["dit"][model]
    base, image = PUBLISHED[model]
    base_keys = json.loads((golden_dir / "wan_configs.json").read_text())["models"][base]["keys"]
    depth = entry["constructor"]["num_layers"]
    expected = {key: shape for key, shape in base_keys.items() if _block_of(key) < depth}
    for key, shape in entry["differs"].items():
        repeats = range(depth) if key.startswith("blocks.0.") else [0]
        expected |= {key.replace("blocks.0.", f"blocks.{i}."): shape for i in repeats}
    shapes = {key: tuple(shape) for key, shape in expected.items()}
    config = dit_config_from_shapes(shapes, entry["constructor"])
    assert {name: config[name] for name in image} == image
    assert ("image_dim" in config) == config["has_image_input"] == bool(image)
    with torch.device("meta"):
        dit = WanModel(**config)
    assert {key: tuple(value.shape) for key, value in dit.state_dict().items()} == shapes
    assert len(shapes) == entry["keys"]
    assert sum(p.numel() for p in dit.parameters()) == entry["parameters"]
    assert sum(p.numel() for p in dit.blocks[0].parameters()) == entry["parameters of block 0"]


def _block_of(key: str) -> int:
    return int(key.split(".")[1]) if key.startswith("blocks.") else -1
