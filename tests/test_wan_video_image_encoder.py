"""The CLIP image encoder of Wan2.1's image models against golden tensors of the official code."""

import json
from pathlib import Path

import pytest
import torch

from diffsynth.models.checkpoint_files import StoredTensor
from diffsynth.models.wan_video_image_encoder import (
    WanImageEncoder,
    image_encoder_config_from_shapes,
    transformers_to_official,
)

CLOSE = {"atol": 3e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def clip(golden):
    tensors, info = golden("clip_tiny")
    weights = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}
    encoder = WanImageEncoder(**info["kwargs"]).requires_grad_(False)
    encoder.load_state_dict(weights, strict=True)
    return encoder, tensors, weights


@pytest.mark.parametrize("name", ["a", "b"])
def test_features_are_the_official_ones_before_the_last_block(clip, name):
    encoder, g, _ = clip
    features = encoder.encode_image(g[f"image_{name}"])
    torch.testing.assert_close(features, g[f"features_{name}"], **CLOSE)


def test_pictures_in_a_batch_give_what_each_gives_alone(clip):
    encoder, g, _ = clip
    both = torch.cat([g["image_a"], g["image_a"].flip(-1)])
    alone = torch.cat([encoder.encode_image(image[None]) for image in both])
    torch.testing.assert_close(encoder.encode_image(both), alone, **CLOSE)


def test_names_load_with_and_without_their_prefix_and_what_is_not_used_is_skipped(clip, golden):
    encoder, _, weights = clip
    other = WanImageEncoder(**golden("clip_tiny")[1]["kwargs"])
    bare = {key.removeprefix("visual."): value for key, value in weights.items()}
    other.load_state_dict({**bare, "textual.model.weight": torch.zeros(1), "log_scale": torch.zeros(())})
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), encoder.parameters(), strict=True))
    assert len(other.transformer) == 3
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: value for key, value in bare.items() if "norm1" not in key})


def test_the_names_of_transformers_give_the_same_model(clip, golden):
    _, _, weights = clip
    bare = {key.removeprefix("visual."): value for key, value in weights.items()}
    theirs = {}
    for key, value in bare.items():
        for ours, name in (
            ("cls_embedding", "vision_model.embeddings.class_embedding"),
            ("pos_embedding", "vision_model.embeddings.position_embedding.weight"),
            ("patch_embedding", "vision_model.embeddings.patch_embedding"),
            ("pre_norm", "vision_model.pre_layrnorm"),
            ("post_norm", "vision_model.post_layernorm"),
            ("transformer", "vision_model.encoder.layers"),
            (".norm", ".layer_norm"),
            ("attn.proj", "self_attn.out_proj"),
            ("mlp.0", "mlp.fc1"),
            ("mlp.2", "mlp.fc2"),
            ("head", "visual_projection.weight"),
        ):
            key = key.replace(ours, name)
        if "to_qkv" in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                theirs[key.replace("attn.to_qkv", f"self_attn.{part}_proj")] = rows
        else:
            theirs[key] = value
    theirs["vision_model.embeddings.class_embedding"] = bare["cls_embedding"].flatten()
    theirs["vision_model.embeddings.position_embedding.weight"] = bare["pos_embedding"][0]
    stored = {key: StoredTensor(Path("clip"), v.shape, lambda v=v: v) for key, v in theirs.items()}
    found = transformers_to_official(stored)
    config = image_encoder_config_from_shapes(
        {key: tuple(value.shape) for key, value in found.items()}, {"num_attention_heads": 4}
    )
    assert config == golden("clip_tiny")[1]["kwargs"]
    assert {key for key in found if not key.startswith("head")} == {key for key in bare if key != "head"}
    for key, tensor in found.items():
        if not key.startswith("head"):
            assert tensor.shape == bare[key].shape
            assert torch.equal(tensor.read(), bare[key])


def test_the_published_encoder_has_the_official_names_and_shapes(golden_dir):
    published = json.loads((golden_dir / "wan_family_keys.json").read_text())["CLIP visual tower"]
    shapes = {key: tuple(shape) for key, shape in published["shapes (block 0 of 32)"].items()}
    block = {key: shape for key, shape in shapes.items() if key.startswith("transformer.0.")}
    shapes |= {key.replace(".0.", f".{i}.", 1): shape for i in range(32) for key, shape in block.items()}
    assert len(shapes) == published["keys"]
    with torch.device("meta"):
        encoder = WanImageEncoder()
        told = WanImageEncoder(**image_encoder_config_from_shapes(shapes, {"num_heads": 40}))
    own = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    assert own == {key: shape for key, shape in shapes.items() if not key.startswith(encoder.unused)}
    assert {key: tuple(value.shape) for key, value in told.state_dict().items()} == own
    assert told.transformer[0].attn.num_heads == 16


def test_half_precision_stays_near(clip, golden):
    _, g, weights = clip
    half = WanImageEncoder(**golden("clip_tiny")[1]["kwargs"]).requires_grad_(False)
    half.load_state_dict(weights)
    features = half.bfloat16().encode_image(g["image_a"])
    assert (features - g["features_a"]).abs().mean() < 0.03
