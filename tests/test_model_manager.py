"""Loading: every layout, every dtype, every kind of damage."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth import ModelManager
from diffsynth.models.checkpoint_files import CheckpointError
from diffsynth.models.packed_linear import PackedLinear
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.testing import write_checkpoint

INDEX = "diffusion_pytorch_model.safetensors.index.json"
T5 = "models_t5_umt5-xxl-enc-bf16.pth"
VAE = "Wan2.1_VAE.pth"


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def load(*entries, **options):
    manager = ModelManager(torch_dtype=torch.float32)
    manager.load_models(list(entries), **options)
    return manager


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def dit_output(manager):
    torch.manual_seed(0)
    dit = manager.fetch_model("wan_video_dit")
    return dit(torch.randn(1, 16, 2, 4, 6), torch.tensor([300.0]), torch.randn(1, 5, dit.text_dim))


def test_a_folder_loads_all_three_models(tiny_checkpoint):
    manager = load(tiny_checkpoint)
    assert sorted(entry.name for entry in manager.loaded) == [
        "wan_video_dit",
        "wan_video_text_encoder",
        "wan_video_vae",
    ]
    for entry in manager.loaded:
        assert not entry.model.training
        for tensor in [*entry.model.parameters(), *entry.model.buffers()]:
            assert tensor.device.type == "cpu"
            assert not tensor.requires_grad


def test_folder_index_shard_list_and_single_file_give_the_same_dit(tiny_checkpoint, tmp_path):
    single = tmp_path / "single" / "model.safetensors"
    single.parent.mkdir()
    save_file(
        {key: value for file in shards(tiny_checkpoint) for key, value in load_file(file).items()}, single
    )
    shutil.copy(tiny_checkpoint / "config.json", single.parent)
    expected = dit_output(load(tiny_checkpoint))
    for entry in (tiny_checkpoint / INDEX, [str(file) for file in shards(tiny_checkpoint)], single):
        assert torch.equal(dit_output(load(entry)), expected)


def test_a_prefix_on_every_name_is_taken_off(tiny_checkpoint, tmp_path):
    weights = {key: value for file in shards(tiny_checkpoint) for key, value in load_file(file).items()}
    save_file(
        {f"model.diffusion_model.{key}": value for key, value in weights.items()},
        tmp_path / "comfy.safetensors",
    )
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    assert torch.equal(dit_output(load(tmp_path / "comfy.safetensors")), dit_output(load(tiny_checkpoint)))


def test_a_vae_wrapped_in_model_state_loads(checkpoint):
    weights = torch.load(checkpoint / VAE, weights_only=True)
    torch.save(
        {"model_state": {f"model.{key}": value for key, value in weights.items()}}, checkpoint / "wrapped.pth"
    )
    plain, wrapped = (load(checkpoint / name).fetch_model("wan_video_vae") for name in (VAE, "wrapped.pth"))
    video = torch.randn(1, 3, 5, 16, 16)
    assert torch.equal(plain.encode(video), wrapped.encode(video))


def test_the_old_torch_format_loads_too(checkpoint):
    weights = torch.load(checkpoint / VAE, weights_only=True)
    torch.save(weights, checkpoint / "old.pth", _use_new_zipfile_serialization=False)
    assert load(checkpoint / "old.pth").fetch_model("wan_video_vae").z_dim == 16


def test_any_width_and_depth_loads_and_published_sizes_are_named(tmp_path, caplog, tiny_checkpoint):
    caplog.set_level(logging.INFO)
    dit = WanModel(
        dim=256, in_dim=16, ffn_dim=40, out_dim=16, text_dim=24, freq_dim=32, num_heads=2, num_layers=3
    )
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    loaded = load(tmp_path / "dit.safetensors").fetch_model("wan_video_dit")
    assert (loaded.num_heads, loaded.num_layers, loaded.ffn_dim, loaded.text_len) == (2, 3, 40, 512)
    assert "wan_video_dit: unpublished size" in caplog.text
    load(tiny_checkpoint)
    assert f"wan_video_vae: unpublished size from {tiny_checkpoint / VAE}" in caplog.text


def test_heads_that_shapes_cannot_tell_are_asked_for(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"number of heads of a DiT of width 24.*config\.json"):
        load(checkpoint / INDEX)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_tensor_gets_the_dtype_asked_for(tiny_checkpoint, dtype):
    manager = load(tiny_checkpoint, torch_dtype=dtype)
    for entry in manager.loaded:
        assert {parameter.dtype for parameter in entry.model.parameters()} == {dtype}


def test_float8_stores_block_linears_only_and_computes_in_bfloat16(tiny_checkpoint):
    manager = load(tiny_checkpoint, torch_dtype=torch.float8_e4m3fn)
    dit = manager.fetch_model("wan_video_dit")
    packed = [name for name, module in dit.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 2 * 10
    assert dit.dtype == torch.bfloat16
    assert dit.blocks[0].self_attn.q.weight.element_size() == 1
    assert dit.head.head.weight.dtype == dit.blocks[0].modulation.dtype == torch.bfloat16
    exact, rough = dit_output(load(tiny_checkpoint)), dit_output(manager)
    assert (exact - rough).abs().mean() < 0.16 * exact.std()  # 0.09, 0.14 with builds of PyTorch for CUDA
    ids = torch.tensor([[5, 6, 7, 1]])
    text = manager.fetch_model("wan_video_text_encoder")(ids, torch.ones_like(ids))
    reference = load(tiny_checkpoint).fetch_model("wan_video_text_encoder")(ids, torch.ones_like(ids))
    assert text.dtype == torch.bfloat16
    assert (text - reference).abs().mean() < 0.1 * reference.std()


def test_an_unsupported_dtype_is_refused_with_the_known_ones(tiny_checkpoint):
    with pytest.raises(ValueError, match=r"torch_dtype must be one of .*bfloat16.*got torch\.int32"):
        load(tiny_checkpoint, torch_dtype=torch.int32)


def test_missing_files_are_named_with_the_download_command(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors.*fastvmt download"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors.*does not exist"):
        load([shards(checkpoint)[0], tmp_path / "missing.safetensors"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no weight files.*fastvmt download"):
        load(tmp_path / "empty")
    shards(checkpoint)[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 shards of .*00002-of-00002\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model-00002-of-00002.safetensors", T5, VAE])
@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_a_truncated_file_is_named(checkpoint, name, keep):
    file = checkpoint / name
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf"{name}"):
        load(checkpoint / INDEX if name.endswith("safetensors") else file)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model-00001-of-00002.safetensors", VAE])
def test_a_file_of_other_bytes_is_named(checkpoint, name):
    (checkpoint / name).write_bytes(b"<html>404</html>" * 1000)
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint / name)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "proof"), "w"))

    torch.save({"weight": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth holds more than tensors"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "proof").exists()


def test_an_index_may_not_point_out_of_its_folder(checkpoint):
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"]["head.head.bias"] = "../secret.safetensors"
    (checkpoint / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="shards must lie beside their index"):
        load(checkpoint / INDEX)
    (checkpoint / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="not an index"):
        load(checkpoint / INDEX)


def test_missing_unexpected_and_misshapen_tensors_are_counted_and_named(checkpoint):
    file = shards(checkpoint)[1]
    weights = load_file(file)
    removed = sorted(key for key in weights if key.startswith("blocks.1.ffn"))
    for key in removed[:2]:
        del weights[key]
    weights["blocks.1.extra"] = torch.zeros(1)
    weights["head.head.bias"] = torch.zeros(3)
    save_file(weights, file)
    with pytest.raises(CheckpointError) as error:
        load(shards(checkpoint))
    message = str(error.value)
    assert f"2 missing ({removed[0]}, {removed[1]})" in message
    assert "1 unexpected (blocks.1.extra)" in message
    assert "1 of the wrong shape (head.head.bias (3,) instead of (64,))" in message


def test_a_tensor_in_two_shards_is_refused(checkpoint):
    first, second = shards(checkpoint)
    save_file(load_file(second) | {"patch_embedding.bias": torch.zeros(24)}, second)
    with pytest.raises(
        CheckpointError, match=rf"'patch_embedding.bias' stands both in .*{first.name} and in .*{second.name}"
    ):
        load([first, second])


def test_weights_of_something_else_are_refused(tmp_path):
    save_file({"model.layers.0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"other\.safetensors is not a Wan2\.1 DiT, text encoder or VAE.*layers\.0\.weight",
    ):
        load(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no Wan2\.1"):
        load(tmp_path)


def test_a_model_that_is_not_loaded_is_asked_for_by_name(tiny_checkpoint):
    manager = load(tiny_checkpoint / VAE)
    with pytest.raises(ValueError, match="no model 'wan_video_dit' is loaded; loaded: wan_video_vae"):
        manager.find("wan_video_dit")


def test_a_single_path_instead_of_a_list_is_refused(tiny_checkpoint):
    with pytest.raises(TypeError, match="file_path_list must be a list"):
        ModelManager().load_models(str(tiny_checkpoint))


def test_a_written_checkpoint_depends_on_the_seed_alone(tiny_checkpoint, tmp_path):
    again = write_checkpoint(tmp_path / "again")
    other = write_checkpoint(tmp_path / "other", seed=1)
    for file in shards(tiny_checkpoint):
        assert (again / file.name).read_bytes() == file.read_bytes() != (other / file.name).read_bytes()
    with pytest.raises(FileExistsError, match="again has files in it"):
        write_checkpoint(again)
    with pytest.raises(ValueError, match="size must be one of tiny"):
        write_checkpoint(tmp_path / "big", size="huge")


@pytest.mark.parametrize("name", ["notes.pth", "optimizer.pth", "._Wan2.1_VAE.pth"])
def test_foreign_files_in_a_folder_are_left_out(checkpoint, name, caplog):
    (checkpoint / name).write_bytes(b"")
    assert len(load(checkpoint).loaded) == 3
    assert name.startswith(".") or f"{name} is truncated" in caplog.text


def test_damaged_parts_of_a_folder_are_not_left_out(checkpoint):
    (checkpoint / VAE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=VAE):
        load(checkpoint)


def test_of_two_dits_in_a_folder_the_indexed_one_is_loaded(checkpoint, caplog):
    weights = {
        key: torch.zeros_like(value) for file in shards(checkpoint) for key, value in load_file(file).items()
    }
    expected = dit_output(load(checkpoint))
    save_file(weights, checkpoint / "other_fp16.safetensors")
    manager = load(checkpoint)
    assert len(manager.loaded) == 3
    assert torch.equal(dit_output(manager), expected)
    assert "other_fp16.safetensors is a second wan_video_dit in the folder; left out" in caplog.text


def test_shards_without_their_index_must_all_be_there(checkpoint):
    (checkpoint / INDEX).unlink()
    dit_output(load(checkpoint))
    with pytest.raises(CheckpointError, match="give all shards in one list, or the folder"):
        load(shards(checkpoint)[1])
    shards(checkpoint)[0].unlink()
    with pytest.raises(FileNotFoundError, match="has 1 of 2 shards of diffusion_pytorch_model"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["{}.fp16-{}-of-00002", "{}-{}-of-00002.fp16"])
def test_shards_of_a_variant_load_as_diffusers_names_them(checkpoint, name):
    whole, index = dit_output(load(checkpoint / INDEX)), json.loads((checkpoint / INDEX).read_text())
    names = {}
    for shard, number in zip(shards(checkpoint), ("00001", "00002"), strict=True):
        new = f"{name.format('diffusion_pytorch_model', number)}.safetensors"
        names[shard.name] = shard.rename(checkpoint / new).name
    index["weight_map"] = {key: names[shard] for key, shard in index["weight_map"].items()}
    (checkpoint / INDEX).unlink()
    variant = checkpoint / "diffusion_pytorch_model.safetensors.index.fp16.json"
    variant.write_text(json.dumps(index))
    for entry in (variant, checkpoint):
        assert torch.equal(dit_output(load(entry)), whole)


@pytest.mark.parametrize("given", ["2", 0, 5])
def test_a_config_that_does_not_fit_the_weights_is_named(checkpoint, given):
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_heads": given}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        load(checkpoint)


def test_an_entry_that_names_nothing_is_refused():
    for entry in ([], None):
        with pytest.raises(ValueError, match="an entry must be a path or a list of shards"):
            load(entry)
