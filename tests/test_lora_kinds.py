"""LoRAs of every kind: as PEFT writes and computes them, as the formulas say, and on eight-bit weights."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffsynth import ModelManager
from diffsynth.models.checkpoint_files import CheckpointError
from diffsynth.models.packed_linear import FP8, INT8
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.vram_management.streaming import tensors_of

SIZE = {
    "dim": 48, "ffn_dim": 96, "num_heads": 4, "num_layers": 2, "in_dim": 16, "out_dim": 16, "text_dim": 32,
    "freq_dim": 32, "eps": 1e-6, "patch_size": (1, 2, 2),
}  # fmt: skip
TARGETS = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
Q = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    dit = WanModel(**SIZE)
    for tensor in dit.parameters():
        nn.init.normal_(tensor, std=0.2)
    folder = tmp_path_factory.mktemp("dit")
    save_file({name: x.contiguous() for name, x in dit.state_dict().items()}, folder / "dit.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_heads": SIZE["num_heads"]}))
    return folder / "dit.safetensors"


def load(checkpoint, dtype=torch.float32):
    manager = ModelManager(torch_dtype=dtype, file_path_list=[checkpoint])
    return manager, manager.fetch_model("wan_video_dit")


def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 2, 8, 8, generator=generator)
    return x, torch.tensor([500.0]), torch.randn(1, 7, 32, generator=generator)


PEFT = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rs-LoRA": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "alpha_pattern": {"ffn.0": 2, r"blocks\.1\.self_attn\.q": 16},
        "rank_pattern": {"ffn.2": 2, r"blocks\.0\.cross_attn\.\w": 3}, "use_rslora": True,
    },
    "DoRA": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "bias": {"r": 4, "lora_alpha": 8, "lora_bias": True},
    "LoHa": {"r": 4, "alpha": 8, "alpha_pattern": {"ffn.0": 2}},
    "LoKr": {"r": 2, "alpha": 8, "decompose_both": True, "decompose_factor": 8},
    "LoKr, full": {"r": 999, "alpha": 500, "decompose_factor": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("dtype", [torch.float32, INT8])
def test_what_peft_writes_does_what_peft_does(checkpoint, tmp_path, kind, dtype):
    peft = pytest.importorskip("peft", reason="peft, of the dev extra, writes these files")
    config = {"LoHa": peft.LoHaConfig, "LoKr": peft.LoKrConfig}.get(kind.split(",")[0], peft.LoraConfig)
    _, wide = load(checkpoint)
    plain = wide(*inputs())
    tuned = peft.get_peft_model(wide, config(target_modules=TARGETS, **PEFT[kind]))
    torch.manual_seed(2)
    for name, tensor in tuned.named_parameters():
        if "magnitude" in name:
            tensor.data *= 1 + 0.2 * torch.rand_like(tensor)
        elif tensor.requires_grad:
            nn.init.normal_(tensor, std=0.1 if "lora" in name else 0.4)
    true = tuned.base_model.model(*inputs()) - plain
    tuned.save_pretrained(tmp_path)
    manager, dit = load(checkpoint, dtype)
    before = dit(*inputs())
    manager.load_lora(tmp_path / "adapter_model.safetensors")
    changed = dit(*inputs()) - before
    error = (changed - true).norm() / true.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.06)
    manager.unload_lora()
    assert torch.equal(dit(*inputs()), before)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_what_begins_by_changing_the_weights_is_refused(checkpoint, tmp_path, start):
    peft = pytest.importorskip("peft", reason="peft, of the dev extra, writes these files")
    manager, _ = load(checkpoint)
    config = peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=start)
    peft.get_peft_model(load(checkpoint)[1], config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"with init_lora_weights='{start}' PEFT changes the model's"):
        manager.load_lora(tmp_path / "adapter_model.safetensors")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def effect(checkpoint, folder, tensors, header=None, strength=1.0, layer=Q):
    """What a file with these tensors adds to a layer's weight, and the weight before."""
    save_file(tensors, folder / "lora.safetensors", header)
    manager, dit = load(checkpoint)
    weight = dit.get_submodule(layer).weight
    before = weight.clone()
    manager.load_lora(folder / "lora.safetensors", strength)
    return dit.get_submodule(layer).weight - before, before


def pair(name=Q, rank=3, **more):
    down, up = normal(rank, 48, seed=1), normal(48, rank, seed=2)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, **more}, up @ down


PREFIXES = (
    "",
    "pipe.dit.",
    "dit.",
    "diffusion_model.",
    "model.diffusion_model.",
    "lora_unet_",
    "lora_unet__",
)


@pytest.mark.parametrize("prefix", [*PREFIXES, "lycoris_"])
def test_every_prefix_names_the_same_layer(checkpoint, tmp_path, prefix):
    name = prefix + (Q.replace(".", "_") if prefix.endswith("_") else Q)
    tensors, product = pair(name)
    torch.testing.assert_close(effect(checkpoint, tmp_path, tensors)[0], product, atol=1e-5, rtol=1e-4)


ALPHA, FLAG = {f"{Q}.alpha": torch.tensor(6.0)}, "use_rslora_flag"
HEADERS = {
    "musubi's flag": ({}, {**ALPHA, FLAG: torch.tensor(True)}, 6 / 3**0.5),
    "musubi's flag, false": ({}, {**ALPHA, FLAG: torch.tensor(False)}, 2),
    "network_alpha": ({"network_alpha": "6"}, {}, 2.0),
    "ss_network_alpha beside alphas": ({"ss_network_alpha": "30"}, ALPHA, 2.0),
    "ss_network_alpha that a converter has left, its factor being in the tensors": (
        {"ss_network_alpha": "1", "ss_network_dim": "3"}, {}, 1,
    ),
    "rs-LoRA in the header": ({"lora_alpha": "6", "use_rslora": "True"}, {}, 6 / 3**0.5),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_the_scale_is_the_one_that_the_file_says(checkpoint, tmp_path, caplog, case):
    caplog.set_level(logging.INFO)
    header, more, scale = HEADERS[case]
    tensors, product = pair(**more)
    change, _ = effect(checkpoint, tmp_path, tensors, header)
    torch.testing.assert_close(change, scale * product, atol=1e-5, rtol=1e-4)
    assert f"scale {scale:g}, from " in caplog.text


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector", "dora_scale", "dora_layer.weight"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora_by_rows(checkpoint, tmp_path, spelling, strength):
    magnitude = normal(48, seed=3).abs()
    shaped = magnitude[:, None] if spelling == "dora_scale" else magnitude
    tensors, product = pair(**{f"{Q}.{spelling}": shaped.contiguous()})
    change, before = effect(checkpoint, tmp_path, tensors, strength=strength)
    moved = before + product
    expected = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - before
    torch.testing.assert_close(change, strength * expected, atol=1e-5, rtol=1e-4)


def test_dora_by_columns(checkpoint, tmp_path):
    magnitude = normal(1, 48, seed=3).abs()
    tensors, product = pair(**{f"{Q}.dora_scale": magnitude})
    change, before = effect(checkpoint, tmp_path, tensors)
    moved = before + product
    torch.testing.assert_close(change, magnitude * moved / moved.norm(dim=0) - before, atol=1e-5, rtol=1e-4)


def test_lokr_and_loha_of_lycoris(checkpoint, tmp_path):
    """LoKr has a scale only where it has a rank."""
    a, b = normal(6, 4), normal(8, 12)
    full = {f"{Q}.lokr_w1": a, f"{Q}.lokr_w2": b, f"{Q}.alpha": torch.tensor(5.0)}
    torch.testing.assert_close(effect(checkpoint, tmp_path, full)[0], torch.kron(a, b), atol=1e-5, rtol=1e-4)
    left, right = normal(8, 2), normal(2, 12)
    factored = {f"{Q}.lokr_w1": a, f"{Q}.lokr_w2_a": left, f"{Q}.lokr_w2_b": right}
    change, _ = effect(checkpoint, tmp_path, {**factored, f"{Q}.alpha": torch.tensor(5.0)})
    torch.testing.assert_close(change, 2.5 * torch.kron(a, left @ right), atol=1e-5, rtol=1e-4)
    parts = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(
        {"w1_a": (48, 2), "w1_b": (2, 48), "w2_a": (48, 2), "w2_b": (2, 48)}.items())}  # fmt: skip
    change, _ = effect(checkpoint, tmp_path, {f"{Q}.hada_{name}": x for name, x in parts.items()})
    product = (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    torch.testing.assert_close(change, product, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("alpha", "rank"), [(float("nan"), 3), (float("inf"), 3), ([1.0, 2.0], 3), ([], 3), (1.0, 0)]
)
def test_a_scale_that_is_no_number_is_refused(checkpoint, tmp_path, alpha, rank):
    tensors, _ = pair(rank=rank, **{f"{Q}.alpha": torch.tensor(alpha)})
    with pytest.raises(CheckpointError, match=f"no finite number|does not fit {Q}"):
        effect(checkpoint, tmp_path, tensors)


def test_a_folder_in_place_of_a_lora_is_named(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^LoRA .* is no file$"):
        load(checkpoint)[0].load_lora(tmp_path)


def test_differences_of_modulations_are_added_and_taken_away(checkpoint, tmp_path):
    manager, dit = load(checkpoint)
    tensors = {
        "diffusion_model.blocks.1.diff_m": normal(1, 6, 48),
        "diffusion_model.head.modulation.diff": normal(1, 2, 48),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    before = {name: dit.get_submodule(name).modulation.clone() for name in ("blocks.1", "head")}
    manager.load_lora(tmp_path / "lora.safetensors", 0.5)
    for (name, modulation), change in zip(before.items(), tensors.values(), strict=True):
        expected = modulation + 0.5 * change
        torch.testing.assert_close(dit.get_submodule(name).modulation.data, expected)
    manager.unload_lora()
    assert all(torch.equal(dit.get_submodule(name).modulation, x) for name, x in before.items())


@pytest.mark.parametrize("stored", [FP8, INT8])
@pytest.mark.parametrize("kind", ["plain", "DoRA", "LoHa", "LoKr", "diff"])
def test_a_small_lora_keeps_its_effect_on_packed_weights(checkpoint, tmp_path, stored, kind):
    """Half a percent of the weight's norm: packing the sum anew would drown it."""
    weight = load_file(checkpoint)[f"{Q}.weight"]
    a, b = normal(48, 4, seed=1), normal(4, 48, seed=2)
    tensors = {
        "plain": {"lora_A.weight": b, "lora_B.weight": a},
        "LoHa": {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": 2 * a[:, :2], "hada_w2_b": 2 * b[:2]},
        "LoKr": {"lokr_w1": normal(6, 6), "lokr_w2": normal(8, 8)},
        "diff": {"diff": a @ b},
        "DoRA": {"lora_A.weight": 0 * b, "lora_B.weight": 0 * a,
                 "dora_scale": weight.norm(dim=1, keepdim=True) * (1 + 0.005 * normal(48, 1))},
    }[kind]  # fmt: skip
    path = tmp_path / "lora.safetensors"
    save_file({f"{Q}.{part}": tensor.contiguous() for part, tensor in tensors.items()}, path)
    manager, wide = load(checkpoint)
    manager.load_lora(path)
    delta = wide.get_submodule(Q).weight - weight
    strength = 1.0 if kind == "DoRA" else (0.005 * weight.norm() / delta.norm()).item()
    manager, dit = load(checkpoint, stored)
    layer, x = dit.get_submodule(Q), normal(64, 48, seed=5)
    before = layer(x)
    manager.load_lora(path, strength)
    found, true = layer(x) - before, strength * x @ delta.T
    assert nn.functional.cosine_similarity(found.flatten(), true.flatten(), dim=0) > 0.98
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert len({tuple((t.shape, t.dtype) for t in tensors_of(block)) for block in dit.blocks}) == 1
    manager.unload_lora()
    assert torch.equal(layer(x), before)


def test_a_strength_is_changed_without_reading_the_file_again(checkpoint, tmp_path):
    tensors, product = pair()
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    manager, dit = load(checkpoint)
    before = dit.get_submodule(Q).weight.clone()
    manager.load_lora(file_path=path)
    manager.change_lora(path, -0.25)
    torch.testing.assert_close(dit.get_submodule(Q).weight - before, -0.25 * product, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="lora_alpha must be a finite number"):
        manager.change_lora(path, float("inf"))
    with pytest.raises(ValueError, match="is not loaded"):
        manager.change_lora(tmp_path / "other.safetensors", 1.0)


def test_a_link_into_a_hub_cache_is_the_file_itself(checkpoint, tmp_path):
    """The blob has no suffix, and the config stands beside the link."""
    tensors, product = pair()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    save_file(tensors, tmp_path / "blobs" / "5f1e2d")
    link = tmp_path / "snapshots" / "lora.safetensors"
    link.symlink_to("../blobs/5f1e2d")
    (tmp_path / "snapshots" / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')
    manager, dit = load(checkpoint)
    before = dit.get_submodule(Q).weight.clone()
    manager.load_lora(link)
    torch.testing.assert_close(dit.get_submodule(Q).weight - before, 2 * product, atol=1e-5, rtol=1e-4)
    manager.unload_lora(link)
    assert torch.equal(dit.get_submodule(Q).weight, before)
