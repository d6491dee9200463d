"""LoRA files in all their namings, on a tiny DiT loaded from disk."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from diffsynth import ModelManager
from diffsynth.models.checkpoint_files import CheckpointError

RANK = 3
LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0", "patch_embedding")
DIFFUSERS_NAMES = (
    "blocks.0.attn1.to_q",
    "blocks.1.attn2.to_out.0",
    "blocks.1.ffn.net.0.proj",
    "patch_embedding",
)


@pytest.fixture
def manager(tiny_checkpoint):
    manager = ModelManager(torch_dtype=torch.float32)
    manager.load_models([tiny_checkpoint / "diffusion_pytorch_model.safetensors.index.json"])
    return manager


def weights(manager, layers=LAYERS):
    dit = manager.fetch_model("wan_video_dit")
    return {layer: dit.get_submodule(layer).weight.clone() for layer in layers}


def pairs(manager):
    """Random (down, up) for each layer, and the weights that adding up @ down to the present ones gives."""
    torch.manual_seed(0)
    low_rank, merged = {}, {}
    for layer, weight in weights(manager).items():
        down, up = torch.randn(RANK, *weight.shape[1:]), torch.randn(weight.shape[0], RANK)
        low_rank[layer] = (down, up if weight.ndim == 2 else up.reshape(*up.shape, 1, 1, 1))
        merged[layer] = weight + (up @ down.flatten(1)).reshape(weight.shape)
    return low_rank, merged


NAMINGS = {
    "peft": (LAYERS, "diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "peft with adapter name": (LAYERS, "{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "peft wrapped": (LAYERS, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "diffusers": (DIFFUSERS_NAMES, "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "down and up": (LAYERS, "diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "kohya, diffusers names": (
        [name.replace(".", "_") for name in DIFFUSERS_NAMES],
        "lora_unet_{}.lora_down.weight",
        "lora_unet_{}.lora_up.weight",
    ),
    "kohya": (
        [name.replace(".", "_") for name in LAYERS],
        "lora_unet_{}.lora_down.weight",
        "lora_unet_{}.lora_up.weight",
    ),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_merges_the_same_weights(manager, tmp_path, naming, caplog):
    names, down_name, up_name = NAMINGS[naming]
    low_rank, merged = pairs(manager)
    tensors = {}
    for name, (down, up) in zip(names, low_rank.values(), strict=True):
        tensors |= {down_name.format(name): down, up_name.format(name): up}
    save_file(tensors, tmp_path / "lora.safetensors")
    caplog.set_level(logging.INFO)
    manager.load_lora(tmp_path / "lora.safetensors")
    for layer, weight in weights(manager).items():
        torch.testing.assert_close(weight, merged[layer])
    assert "8 of 8 keys match, in 4 layers" in caplog.text


def test_alpha_of_file_and_caller_scale_the_change_and_removal_is_exact(manager, tmp_path):
    before = weights(manager)
    (down, up) = pairs(manager)[0]["blocks.0.self_attn.q"]
    path = tmp_path / "lora.safetensors"
    save_file(
        {
            "blocks.0.self_attn.q.lora_down.weight": down,
            "blocks.0.self_attn.q.lora_up.weight": up,
            "blocks.0.self_attn.q.alpha": torch.tensor(1.5),
        },
        path,
    )
    manager.load_lora(path, lora_alpha=0.5)
    expected = before["blocks.0.self_attn.q"] + 0.5 * 1.5 / RANK * up @ down
    torch.testing.assert_close(weights(manager)["blocks.0.self_attn.q"], expected)
    manager.load_lora(path, lora_alpha=0.5)
    expected = before["blocks.0.self_attn.q"] + 2 * 0.5 * 1.5 / RANK * up @ down
    torch.testing.assert_close(weights(manager)["blocks.0.self_attn.q"], expected)
    manager.unload_lora(path)
    assert all(torch.equal(weight, before[layer]) for layer, weight in weights(manager).items())
    with pytest.raises(ValueError, match="is not loaded"):
        manager.unload_lora(path)


def test_an_adapter_config_beside_the_file_gives_its_scale(manager, tmp_path):
    before, (low_rank, _) = weights(manager), pairs(manager)
    down, up = low_rank["blocks.1.ffn.0"]
    save_file(
        {"blocks.1.ffn.0.lora_A.weight": down, "blocks.1.ffn.0.lora_B.weight": up},
        tmp_path / "adapter.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6}))
    manager.load_lora(tmp_path / "adapter.safetensors")
    torch.testing.assert_close(weights(manager)["blocks.1.ffn.0"], before["blocks.1.ffn.0"] + 2 * up @ down)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_scale_that_diffusers_writes_into_the_header_is_used(manager, tmp_path, prefix):
    before, (low_rank, _) = weights(manager), pairs(manager)
    down, up = low_rank["blocks.1.ffn.0"]
    tensors = {"blocks.1.ffn.0.lora_A.weight": down, "blocks.1.ffn.0.lora_B.weight": up}
    path, config = tmp_path / "lora.safetensors", {f"{prefix}r": RANK, f"{prefix}lora_alpha": 6}
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    manager.load_lora(path)
    torch.testing.assert_close(weights(manager)["blocks.1.ffn.0"], before["blocks.1.ffn.0"] + 2 * up @ down)
    for damaged in ('{"r": 0, "lora_alpha": 6}', '{"r": 3, "lora_alpha": NaN}', "[1]", "[" * 100_000):
        save_file(tensors, path, {"lora_adapter_metadata": damaged})
        with pytest.raises(CheckpointError, match=r"the header of .*lora_alpha and r"):
            manager.load_lora(path)


def test_full_differences_of_weight_and_bias_are_added(manager, tmp_path):
    dit = manager.fetch_model("wan_video_dit")
    norm, linear = dit.blocks[0].norm3.weight.clone(), dit.blocks[0].ffn[2].bias.clone()
    save_file(
        {
            "diffusion_model.blocks.0.norm3.diff": torch.ones(24),
            "diffusion_model.blocks.0.ffn.2.diff_b": torch.full((24,), 2.0),
        },
        tmp_path / "lora.safetensors",
    )
    manager.load_lora(tmp_path / "lora.safetensors", lora_alpha=0.5)
    torch.testing.assert_close(dit.blocks[0].norm3.weight, norm + 0.5)
    torch.testing.assert_close(dit.blocks[0].ffn[2].bias, linear + 1.0)


def test_unknown_keys_are_named_and_the_known_ones_used(manager, tmp_path, caplog):
    (down, up) = pairs(manager)[0]["blocks.1.ffn.0"]
    save_file(
        {
            "blocks.1.ffn.0.lora_A.weight": down,
            "blocks.1.ffn.0.lora_B.weight": up,
            "blocks.9.odd.lora_A.weight": down.clone(),
        },
        tmp_path / "lora.safetensors",
    )
    manager.load_lora(tmp_path / "lora.safetensors")
    assert "leaves out 1 unknown keys: ['blocks.9.odd.lora_A.weight']" in caplog.text


def test_a_lora_that_matches_nothing_is_refused(manager, tmp_path):
    before = weights(manager)
    save_file({"lora_te_text_model.lora_down.weight": torch.ones(2, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="matches no layer of the DiT"):
        manager.load_lora(tmp_path / "lora.safetensors")
    assert all(torch.equal(weight, before[layer]) for layer, weight in weights(manager).items())


def test_a_lora_for_another_size_or_with_half_a_pair_is_refused(manager, tmp_path):
    name = "blocks.0.self_attn.q"
    wrong = {f"{name}.lora_A.weight": torch.ones(2, 99), f"{name}.lora_B.weight": torch.ones(24, 2)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit blocks\.0\.self_attn\.q.*another model"):
        manager.load_lora(tmp_path / "wrong.safetensors")
    save_file({f"{name}.lora_A.weight": torch.ones(2, 24)}, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="only one half of the pair"):
        manager.load_lora(tmp_path / "half.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        manager.load_lora(tmp_path / "nowhere.safetensors")
    assert manager.loras == []


def test_a_layer_without_weights_is_found_under_its_other_name(manager, tmp_path):
    """diffusers' norm2 is the official norm3; the official norm2 has no weights."""
    norm = manager.fetch_model("wan_video_dit").blocks[0].norm3
    before = norm.weight.clone()
    save_file({"transformer.blocks.0.norm2.diff": torch.ones(24)}, tmp_path / "lora.safetensors")
    manager.load_lora(tmp_path / "lora.safetensors")
    torch.testing.assert_close(norm.weight, before + 1)


REFUSED = {
    "alpha alone": (["q.alpha"], (), "matches no layer"),
    "a part of LoHa": (["q.alpha", "q.hada_w1_a"], (), "has only some parts for blocks.0.self_attn.q"),
    "one of LoKr": (["q.lokr_w1"], (2, 2), "has only one half of the pair for blocks.0.self_attn.q"),
    "an unknown kind": (["q.lora_A.weight", "q.oft_blocks"], (24, 24), "'oft_blocks' for .*not supported"),
    "a tucker core": (["q.lokr_t2"], (2, 2), "'lokr_t2' for .*not supported"),
    "bias of another size": (["q.diff_b"], (7,), "does not fit the bias of blocks.0.self_attn.q"),
    "two adapters": (
        ["q.lora_A.a.weight", "q.lora_A.b.weight"],
        (2, 24),
        "several adapters for blocks.0.self_attn.q",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_would_do_nothing_or_something_else_are_refused(manager, tmp_path, case):
    names, shape, message = REFUSED[case]
    tensors = {f"blocks.0.self_attn.{name}": torch.ones(shape) for name in names}
    save_file(tensors, tmp_path / "lora.safetensors")
    before = weights(manager)
    with pytest.raises(CheckpointError, match=message):
        manager.load_lora(tmp_path / "lora.safetensors")
    assert manager.loras == []
    assert all(torch.equal(weight, before[layer]) for layer, weight in weights(manager).items())


def test_a_strength_or_adapter_config_that_is_no_number_is_refused(manager, tmp_path):
    (down, up) = pairs(manager)[0]["blocks.1.ffn.0"]
    path = tmp_path / "lora.safetensors"
    save_file({"blocks.1.ffn.0.lora_A.weight": down, "blocks.1.ffn.0.lora_B.weight": up}, path)
    for alpha in ("1", float("nan")):
        with pytest.raises(ValueError, match="lora_alpha must be a finite number"):
            manager.load_lora(path, lora_alpha=alpha)
    for text in ("{", "{}", '{"r": 0, "lora_alpha": 1}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json is no adapter config"):
            manager.load_lora(path)
