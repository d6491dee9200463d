"""The same weights in the diffusers layout: names changed, components in folders of their own."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from vae_names import diffusers_vae_key

from diffsynth import ModelManager, WanVideoPipeline
from diffsynth.models.wan_video_dit_keys import official_key
from diffsynth.models.wan_video_text_encoder import transformers_to_official_key
from diffsynth.models.wan_video_vae import vae_config_from_shapes


@pytest.fixture(scope="module")
def diffusers_checkpoint(tiny_checkpoint, golden_dir, tmp_path_factory):
    """The tiny checkpoint under diffusers names; those of the DiT are from the reference list."""
    folder = tmp_path_factory.mktemp("diffusers")
    manager = ModelManager(torch_dtype=torch.float32)
    manager.load_models([tiny_checkpoint])
    dit, text, vae = (
        manager.fetch_model(f"wan_video_{name}").state_dict() for name in ("dit", "text_encoder", "vae")
    )
    names = json.loads((golden_dir / "dit_tiny_keymap_diffusers.json").read_text())
    write(folder / "transformer", "diffusion_pytorch_model", {names[key]: dit[key] for key in dit}, shards=2)
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_max_seq_len": 1024, "image_dim": None}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    encoder = manager.fetch_model("wan_video_text_encoder").encoder.state_dict()
    renamed = {
        key: text[transformers_to_official_key(key)] for key in (f"encoder.{name}" for name in encoder)
    }
    renamed["shared.weight"] = text["token_embedding.weight"].clone()
    write(folder / "text_encoder", "model", renamed)
    vae_config = vae_config_from_shapes({key: value.shape for key, value in vae.items()})
    write(
        folder / "vae",
        "diffusion_pytorch_model",
        {diffusers_vae_key(key, vae_config): value for key, value in vae.items()},
    )
    shutil.copytree(tiny_checkpoint / "google" / "umt5-xxl", folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return folder


def write(folder, stem, tensors, shards=1):
    folder.mkdir()
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else f"{stem}.safetensors"
        save_file({key: tensors[key] for key in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def test_the_diffusers_layout_loads_to_the_same_outputs(tiny_checkpoint, diffusers_checkpoint):
    options = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
        "seed": 3,
        "progress_bar_cmd": list,
    }
    official, diffusers = (
        WanVideoPipeline.from_pretrained(folder, device="cpu")("a red car", **options, output_type="pt")
        for folder in (tiny_checkpoint, diffusers_checkpoint)
    )
    # Equal weights; where they lie in memory may change the order of a summation.
    torch.testing.assert_close(official, diffusers, atol=1e-4, rtol=0)


def test_a_component_folder_or_its_shards_load_alone(diffusers_checkpoint):
    folder = diffusers_checkpoint / "transformer"
    for entry in (
        folder,
        sorted(folder.glob("*.safetensors")),
        folder / "diffusion_pytorch_model.safetensors.index.json",
    ):
        manager = ModelManager(torch_dtype=torch.float32)
        manager.load_models([entry])
        assert manager.fetch_model("wan_video_dit").num_heads == 2


def test_statistics_of_the_latents_come_from_the_vae_config(diffusers_checkpoint, tmp_path):
    folder = shutil.copytree(diffusers_checkpoint / "vae", tmp_path / "vae")
    mean, std = [0.5] * 16, [2.0] * 16
    (folder / "config.json").write_text(json.dumps({"latents_mean": mean, "latents_std": std, "z_dim": 16}))
    manager = ModelManager(torch_dtype=torch.float32)
    manager.load_models([folder])
    vae = manager.fetch_model("wan_video_vae")
    video = torch.rand(1, 3, 1, 16, 16)
    torch.testing.assert_close(vae.encode(video), (vae.encode_moments(video)[0] - 0.5) / 2.0)


@pytest.mark.parametrize("model", ["Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B"])
def test_every_published_dit_name_is_understood(golden_dir, model):
    published = json.loads((golden_dir / "wan_configs.json").read_text())
    table = published["official_to_diffusers"]
    names = {**table["block_0_and_top_level"], **table["i2v_extra (block 0 and top level)"]}
    for official, diffusers in names.items():
        assert official_key(diffusers) == official
    covered = {re.sub(r"blocks\.\d+", "blocks.0", key) for key in published["models"][model]["keys"]}
    assert covered <= names.keys()
    assert official_key("blocks.0.attn3.to_q.weight") is None
    assert official_key("text_model.weight") is None
