"""Weights in every layout in which people have them: the same model, packed where the file packs it."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth import ModelManager, WanVideoPipeline
from diffsynth.cli.main import main
from diffsynth.models.checkpoint_files import CheckpointError, open_weights
from diffsynth.models.gguf_files import UNPACK, unpack_gguf
from diffsynth.models.packed_linear import PackedLinear
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder, transformers_to_official_key
from diffsynth.runs.identity import sha256_of_frames
from diffsynth.runs.record import read_record
from diffsynth.testing import write_checkpoint

FP8 = torch.float8_e4m3fn
DIT = {
    "dim": 64, "ffn_dim": 128, "num_heads": 4, "num_layers": 2, "in_dim": 16, "out_dim": 16, "text_dim": 32,
    "freq_dim": 32, "eps": 1e-6, "patch_size": (1, 2, 2),
}  # fmt: skip
TEXT = {
    "vocab": 64,
    "dim": 32,
    "dim_attn": 32,
    "dim_ffn": 64,
    "num_heads": 2,
    "num_layers": 2,
    "num_buckets": 8,
}
COMFY = "model.diffusion_model."


def random_state(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.2 * torch.randn(x.shape, generator=generator) for key, x in model.state_dict().items()}


@pytest.fixture(scope="module")
def dit_state():
    return random_state(WanModel(**DIT), 0)


@pytest.fixture(scope="module")
def text_state():
    return random_state(WanTextEncoder(**TEXT), 1)


def load(path, dtype=torch.float32, name="wan_video_dit"):
    (path.parent / "config.json").write_text(json.dumps({"num_heads": DIT["num_heads"]}))
    return ModelManager(torch_dtype=dtype, file_path_list=[path]).fetch_model(name)


def velocity(dit):
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(1, 16, 2, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    return dit(x, torch.tensor([500.0]), context)


def expected(state):
    dit = WanModel(**DIT)
    dit.load_state_dict(state)
    return velocity(dit)


def in_blocks(key, tensor):
    return key.startswith("blocks.") and key.endswith(".weight") and tensor.ndim == 2


def float8(state, spelling):
    """The tensors of a float8 file in a spelling, and the numbers that they stand for."""
    stored, true = {}, dict(state)
    for key, weight in state.items():
        stored[key] = weight
        if not in_blocks(key, weight):
            continue
        layer = key.removesuffix(".weight")
        scale = weight.abs().amax(dim=1 if spelling == "rows" else None, keepdim=True) / 448
        if spelling == "none":
            scale = torch.ones(1, 1)
        numbers = (weight / scale).to(FP8)
        stored[key], true[key] = numbers, numbers.float() * scale
        if spelling == "scale_weight":
            stored |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": torch.ones(1)}
        elif spelling in ("weight_scale", "rows"):
            stored[f"{layer}.weight_scale"] = scale if spelling == "rows" else scale.reshape(())
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
        elif spelling == "weight_scale_inv":
            stored |= {f"{layer}.weight_scale_inv": scale, f"{layer}.input_scale": torch.ones(())}
    if spelling == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    return stored, true


@pytest.mark.parametrize("prefix", ["", COMFY])
@pytest.mark.parametrize("spelling", ["none", "scale_weight", "weight_scale", "rows", "weight_scale_inv"])
def test_float8_files_are_their_numbers_times_their_scales(dit_state, tmp_path, spelling, prefix):
    stored, true = float8(dit_state, spelling)
    save_file({prefix + key: x for key, x in stored.items()}, tmp_path / "dit.safetensors")
    dit = load(tmp_path / "dit.safetensors")
    torch.testing.assert_close(velocity(dit), expected(true))
    packed = [module for module in dit.blocks.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == sum(in_blocks(key, x) for key, x in dit_state.items())
    assert all(module.weight.dtype == torch.int8 for module in packed)
    # Once rounded to bfloat16, as a file of the same numbers in bfloat16 is.
    narrow = load(tmp_path / "dit.safetensors", torch.bfloat16)
    layer = next(m for m in narrow.blocks.modules() if isinstance(m, PackedLinear))
    x = torch.eye(64, dtype=torch.bfloat16)
    weight = (layer(x) - layer.bias).mT
    torch.testing.assert_close(weight, true["blocks.0.self_attn.q.weight"].bfloat16(), atol=4e-3, rtol=0)


def test_float8_weights_of_a_pickle_have_their_scales_too(dit_state, tmp_path):
    stored, true = float8(dit_state, "weight_scale_inv")
    torch.save(stored, tmp_path / "dit.pth")
    dit = load(tmp_path / "dit.pth")
    torch.testing.assert_close(velocity(dit), expected(true))
    assert isinstance(dit.blocks[0].self_attn.q, PackedLinear)


def test_float8_weights_take_gradients_of_their_inputs(dit_state, tmp_path):
    stored, true = float8(dit_state, "scale_weight")
    save_file(stored, tmp_path / "dit.safetensors")
    layer = load(tmp_path / "dit.safetensors").blocks[0].self_attn.q
    x = torch.randn(3, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, true["blocks.0.self_attn.q.weight"].sum(0).expand(3, -1))


def test_other_ways_to_store_eight_bits_are_refused_by_name(dit_state, tmp_path):
    stored, _ = float8(dit_state, "weight_scale")
    note = json.dumps({"format": "nvfp4"}).encode()
    stored["blocks.0.self_attn.q.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    save_file(stored, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks.0.self_attn.q.weight is stored as nvfp4; .*float8"):
        load(tmp_path / "dit.safetensors")
    stored, _ = float8(dit_state, "weight_scale")
    stored["blocks.0.self_attn.q.weight_scale"] = torch.ones(4, 4)
    save_file(stored, tmp_path / "dit.safetensors")
    with pytest.raises(CheckpointError, match=r"the scale of blocks.0.self_attn.q.weight is \(4, 4\)"):
        load(tmp_path / "dit.safetensors")


def write_gguf(path, state, kind, architecture="wan"):
    gguf = pytest.importorskip("gguf", reason="the gguf package, of the dev extra, writes these files")
    writer, true = gguf.GGUFWriter(path, architecture), {}
    for key, tensor in state.items():
        numbers = tensor.numpy()
        matrix = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        quantised = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        if tensor.ndim > 4:  # as city96's converter does
            writer.add_array(f"comfy.gguf.orig_shape.{key}", [int(side) for side in tensor.shape])
            numbers = numbers.reshape(len(numbers), -1)
        data = gguf.quants.quantize(numbers, quantised)
        true[key] = torch.from_numpy(gguf.quants.dequantize(data, quantised)).reshape(tensor.shape)
        writer.add_tensor(key, data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return true


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q4_1", "BF16", "F16"])
def test_gguf_files_are_what_the_gguf_package_reads(dit_state, tmp_path, kind):
    true = write_gguf(tmp_path / "dit.gguf", dit_state, kind)
    dit = load(tmp_path / "dit.gguf")
    torch.testing.assert_close(velocity(dit), expected(true))
    packed = [module for module in dit.blocks.modules() if isinstance(module, PackedLinear)]
    assert bool(packed) == (kind not in ("BF16", "F16"))
    x = torch.randn(3, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(dit.blocks[0].self_attn.q(x).sum(), x)
    torch.testing.assert_close(gradient, true["blocks.0.self_attn.q.weight"].sum(0).expand(3, -1))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_a_lora_stands_beside_the_weights_of_gguf(dit_state, tmp_path, kind):
    """A row of these has another number of bytes than of weights."""
    true = write_gguf(tmp_path / "dit.gguf", dit_state, kind)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": DIT["num_heads"]}))
    manager = ModelManager(torch_dtype=torch.float32, file_path_list=[tmp_path / "dit.gguf"])
    dit, name = manager.fetch_model("wan_video_dit"), "blocks.1.ffn.0"
    before, down, up = velocity(dit), torch.randn(3, 64), torch.randn(128, 3)
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.diff_b": torch.ones(128)}
    save_file(tensors, tmp_path / "lora.safetensors")
    manager.load_lora(tmp_path / "lora.safetensors")
    merged = {f"{name}.weight": true[f"{name}.weight"] + up @ down, f"{name}.bias": true[f"{name}.bias"] + 1}
    change = expected(true | merged) - before
    assert (velocity(dit) - before - change).norm() < 0.01 * change.norm()  # kept in bfloat16
    manager.unload_lora()
    assert torch.equal(velocity(dit), before)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_kinds_that_the_package_cannot_write_unpack_as_it_does(kind):
    gguf = pytest.importorskip("gguf", reason="the gguf package, of the dev extra, has the other unpacker")
    size, _ = UNPACK[kind]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (6, 2 * size), dtype=np.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2):  # finite scales
        data.reshape(-1, size)[:, at : at + 2] = rng.normal(size=(12, 1)).astype(np.float16).view(np.uint8)
    true = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(unpack_gguf(torch.from_numpy(data), kind).numpy(), true)


def test_a_damaged_gguf_and_an_unknown_kind_are_named(dit_state, tmp_path):
    write_gguf(tmp_path / "dit.gguf", dit_state, "Q8_0")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "dit.gguf").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut.gguf is truncated or not a GGUF file"):
        load(tmp_path / "cut.gguf")
    write_gguf(tmp_path / "odd.gguf", {"blocks.0.x.weight": torch.ones(2, 256)}, "TQ1_0")
    with pytest.raises(CheckpointError, match=r"blocks.0.x.weight is of kind TQ1_0; supported are F32, F16"):
        load(tmp_path / "odd.gguf")


WRITERS = {
    "sft": lambda state, folder: save_file(state, folder / "dit.sft") or folder / "dit.sft",
    "no suffix": lambda state, folder: save_file(state, folder / "5f1e2d") or folder / "5f1e2d",
    "bin": lambda state, folder: torch.save(state, folder / "dit.bin") or folder / "dit.bin",
    "state_dict beside others": lambda state, folder: (
        torch.save({"state_dict": state, "global_step": 3}, folder / "dit.pth") or folder / "dit.pth"
    ),
    "a pickle named safetensors": lambda state, folder: (
        torch.save(state, folder / "dit.safetensors") or folder / "dit.safetensors"
    ),
}  # fmt: skip
PREFIXES = ("", COMFY, "diffusion_model.", "module.", "_orig_mod.", "pipe.dit.", "transformer.", "model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_told_by_its_bytes_and_names_by_their_ends(dit_state, tmp_path, writer, prefix):
    path = WRITERS[writer]({prefix + key: x for key, x in dit_state.items()}, tmp_path)
    torch.testing.assert_close(velocity(load(path)), expected(dit_state))


def transformers_names(text_state):
    names = ["shared", "encoder.final_layer_norm"]
    inner = ("layer.0.layer_norm", "layer.1.layer_norm", *(f"layer.0.SelfAttention.{x}" for x in "qkvo"))
    inner += ("layer.0.SelfAttention.relative_attention_bias",)
    inner += tuple(f"layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo"))
    names += [f"encoder.block.{i}.{name}" for i in range(TEXT["num_layers"]) for name in inner]
    found = {f"{name}.weight": text_state[transformers_to_official_key(f"{name}.weight")] for name in names}
    assert len(found) == len(text_state)
    return found


def rows(encoder):
    return encoder(torch.arange(1, 9)[None], torch.ones(1, 8, dtype=torch.long))


def test_a_text_encoder_of_comfy_and_one_of_gguf(text_state, tmp_path):
    whole = WanTextEncoder(**TEXT)
    stored, true = {}, dict(text_state)
    for key, weight in transformers_names(text_state).items():
        stored[key] = weight
        if ".SelfAttention." in key and weight.shape[0] == 32:
            scale = weight.abs().max() / 448
            stored[key] = (weight / scale).to(FP8)
            stored[f"{key.removesuffix('weight')}scale_weight"] = scale
            true[transformers_to_official_key(key)] = stored[key].float() * scale
    whole.load_state_dict(true)
    beside = {"spiece_model": torch.zeros(5, dtype=torch.uint8), "lm_head.weight": torch.zeros(2, 2)}
    save_file(
        {**stored, **beside, "decoder.final_layer_norm.weight": torch.ones(3)}, tmp_path / "t5.safetensors"
    )
    encoder = load(tmp_path / "t5.safetensors", name="wan_video_text_encoder")
    torch.testing.assert_close(rows(encoder), rows(whole))
    llama = {"shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm"}
    parts = {
        "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm",
        **{f"layer.0.SelfAttention.{x}": f"attn_{x}" for x in "qkvo"},
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "layer.1.DenseReluDense.wi_0": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up",
        "layer.1.DenseReluDense.wo": "ffn_down",
    }  # fmt: skip
    for i in range(TEXT["num_layers"]):
        llama |= {f"encoder.block.{i}.{ours}": f"enc.blk.{i}.{theirs}" for ours, theirs in parts.items()}
    named = {
        f"{llama[key.removesuffix('.weight')]}.weight": x for key, x in transformers_names(text_state).items()
    }
    path = tmp_path / "t5.gguf"
    true = write_gguf(path, named, "Q8_0")
    back = {theirs: ours for ours, theirs in llama.items()}
    keys = {key: f"{back[key.removesuffix('.weight')]}.weight" for key in true}
    whole.load_state_dict({transformers_to_official_key(keys[key]): x for key, x in true.items()})
    torch.testing.assert_close(rows(load(path, name="wan_video_text_encoder")), rows(whole))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


def tiny_parts(tiny):
    """The official tensors of the three models, and the bytes of the tokenizer."""
    groups = {
        COMFY: sorted(tiny.glob("*.safetensors")),
        "text_encoders.umt5xxl.transformer.": [tiny / "models_t5_umt5-xxl-enc-bf16.pth"],
        "first_stage_model.": [tiny / "Wan2.1_VAE.pth"],
    }
    read = {
        prefix: {key: x.read().clone().contiguous() for key, x in open_weights(files).items()}
        for prefix, files in groups.items()
    }
    pieces = (tiny / "google" / "umt5-xxl" / "spiece.model").read_bytes()
    return read, torch.tensor(list(pieces), dtype=torch.uint8)


def video(source):
    if isinstance(source, list):
        manager = ModelManager(torch_dtype=torch.float32, file_path_list=source)
        pipe = WanVideoPipeline.from_model_manager(manager, device="cpu")
    else:
        pipe = WanVideoPipeline.from_pretrained(source, device="cpu")
    small = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    return pipe("a cat", seed=1, output_type="latent", progress_bar_cmd=iter, **small)


def test_one_file_with_everything_and_a_folder_of_comfy_make_the_same_video(tiny, tmp_path):
    whole = video(tiny)
    parts, pieces = tiny_parts(tiny)
    joined = {prefix + key: x for prefix, tensors in parts.items() for key, x in tensors.items()}
    config = (tiny / "config.json").read_text()
    one = tmp_path / "one"
    one.mkdir()
    (one / "config.json").write_text(config)
    scale = {"text_encoders.umt5xxl.logit_scale": torch.ones(())}  # beside all text encoders of Comfy
    for beside in ("", "umt5xxl.", "umt5xxl.transformer."):
        save_file({**joined, **scale, f"text_encoders.{beside}spiece_model": pieces}, one / "all.safetensors")
        torch.testing.assert_close(video([one / "all.safetensors"]), whole)
    for folder, tensors in zip(("diffusion_models", "text_encoders", "vae"), parts.values(), strict=True):
        (tmp_path / "comfy" / folder).mkdir(parents=True)
        extra = {"spiece_model": pieces} if folder == "text_encoders" else {}
        save_file({**tensors, **extra}, tmp_path / "comfy" / folder / "wan.safetensors")
    (tmp_path / "comfy" / "diffusion_models" / "config.json").write_text(config)
    torch.testing.assert_close(video(tmp_path / "comfy"), whole)


FOREIGN_FILES = {
    "HunyuanVideo or FLUX": "double_blocks.0.img_attn.qkv.weight",
    "Stable Diffusion 3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "Stable Diffusion": "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
    "LTX-Video, CogVideoX or a relative": "transformer_blocks.0.attn1.to_q.weight",
    "a CLIP image encoder": "visual.transformer.resblocks.0.attn.in_proj_weight",
    "it is a LoRA; load_lora": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
}


@pytest.mark.parametrize(("family", "name"), FOREIGN_FILES.items())
def test_a_file_of_another_family_is_named_for_what_it_is(tmp_path, family, name):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(family)):
        ModelManager(file_path_list=[tmp_path / "x.safetensors"])


def test_a_vae_for_images_is_no_wan_vae(tmp_path):
    save_file(
        {"decoder.mid_block.resnets.0.conv1.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CheckpointError, match="it is a VAE for images"):
        ModelManager(file_path_list=[tmp_path / "x.safetensors"])


def test_a_lora_of_another_family_is_named(tmp_path, dit_state):
    names = [f"lora_unet_double_blocks_0_img_attn_proj.lora_{part}.weight" for part in ("down", "up")]
    save_file(
        dict(zip(names, (torch.zeros(2, 8), torch.zeros(8, 2)), strict=True)), tmp_path / "l.safetensors"
    )
    manager = ModelManager()
    save_file(dit_state, tmp_path / "dit.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": DIT["num_heads"]}))
    manager.load_models([tmp_path / "dit.safetensors"])
    with pytest.raises(CheckpointError, match="it is a LoRA for HunyuanVideo or FLUX"):
        manager.load_lora(tmp_path / "l.safetensors")


def test_models_are_named_one_by_one(tiny_checkpoint, tmp_path, capsys):
    """As files lie in Comfy's folders: each model alone, under another name, in another folder."""
    for name, found in {"t5": "models_t5*.pth", "vae": "*VAE.pth"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "my.bin").symlink_to(next(tiny_checkpoint.glob(found)))
    (tmp_path / "t5" / "google").symlink_to(tiny_checkpoint / "google")
    mine = {"text_encoder": tmp_path / "t5" / "my.bin", "vae": tmp_path / "vae" / "my.bin"}
    mine["dit"] = next(tiny_checkpoint.glob("*.index.json"))
    run = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
        "seed": 0,
        "output_type": "np",
    }
    whole = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")("a cat", **run)
    parts = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu", dit=mine["dit"])("a cat", **run)
    assert (whole == parts).all()
    words = [word for name, file in mine.items() for word in (f"--{name.replace('_', '-')}", file)]
    out = tmp_path / "out.mp4"
    asked = ["--prompt", "a cat", "--mode", "No_transfer", "--height", 32, "--width", 32, "--num-frames", 5]
    assert main(["transfer", *asked, *words, "--steps", 2, "--seed", 0, "--device", "cpu", "-o", out]) == 0
    record = read_record(out)
    assert record.video["frames_sha256"] == sha256_of_frames([Image.fromarray(f) for f in whole])
    assert {mine[name].resolve().name for name in ("text_encoder", "vae")} <= record.model["files"].keys()
    assert main(["transfer", "--from", out, "-o", tmp_path / "again.mp4"]) == 0
    assert "every frame is bit-identical to the recorded one" in capsys.readouterr().out
    assert main(["transfer", *asked, "--vae", mine["dit"], "-o", tmp_path / "b.mp4", "--device", "cpu"]) == 1
    assert ".index.json holds no wan_video_vae" in capsys.readouterr().err
    with pytest.raises(
        TypeError,
        match="weights can be given for dit, text_encoder, vae, image_encoder, low_noise_dit; got clip",
    ):
        WanVideoPipeline.from_pretrained(tiny_checkpoint, clip="x")
