"""Checkpoints rewritten in another dtype load as the same numbers, mapped from the new files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffsynth import ModelManager, WanVideoPipeline
from diffsynth.jobs.convert import convert_checkpoint
from diffsynth.models.checkpoint_files import CheckpointError, open_weights
from diffsynth.testing import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def dit_of(folder):
    manager = ModelManager(device="cpu")
    manager.load_models([folder], torch_dtype=torch.bfloat16)
    return manager.fetch_model("wan_video_dit")


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
def test_a_converted_checkpoint_loads_as_the_same_numbers(folder, tmp_path, shard_bytes):
    output = convert_checkpoint(folder, tmp_path / "converted", shard_bytes=shard_bytes)
    files = sorted(output.glob("diffusion_pytorch_model*.safetensors"))
    assert (len(files) == 1) == (shard_bytes > 10**9)
    assert all(t.read().dtype == torch.bfloat16 for t in open_weights(files).values())
    expected, found = dit_of(folder).state_dict(), dit_of(output).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert WanVideoPipeline.from_pretrained(output, device="cpu").dit.num_layers == 2
    assert not list(tmp_path.glob(".converting*"))


def test_other_files_take_no_more_disk(folder, tmp_path):
    output = convert_checkpoint(folder, tmp_path / "converted")
    assert (output / "Wan2.1_VAE.pth").samefile(folder / "Wan2.1_VAE.pth")


@pytest.mark.slow
def test_the_example_converts(folder, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "convert_weights.py"
    output = tmp_path / "half"
    command = [sys.executable, script, "--model_dir", folder, "--output_dir", output, "--dtype", "float16"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == str(output)
    files = [output / "diffusion_pytorch_model.safetensors"]
    assert all(tensor.read().dtype == torch.float16 for tensor in open_weights(files).values())


def test_nothing_that_is_there_is_replaced(folder, tmp_path):
    with pytest.raises(FileExistsError, match="is there, and holds something else; name a new folder"):
        convert_checkpoint(folder, tmp_path)
    output = convert_checkpoint(folder, tmp_path / "converted")
    (weights,) = output.glob("diffusion_pytorch_model*.safetensors")
    written = weights.stat().st_mtime_ns
    assert convert_checkpoint(folder, output) == output  # again: done before
    assert weights.stat().st_mtime_ns == written
    with pytest.raises(FileExistsError, match="holds something else"):
        convert_checkpoint(folder, output, torch.float16)


def test_what_cannot_be_converted_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.bfloat16, .*; got torch\.int8"):
        convert_checkpoint(folder, tmp_path / "converted", torch.int8)
    only_vae = tmp_path / "vae"
    only_vae.mkdir()
    (only_vae / "Wan2.1_VAE.pth").write_bytes((folder / "Wan2.1_VAE.pth").read_bytes())
    with pytest.raises(CheckpointError, match="holds no DiT in the official layout"):
        convert_checkpoint(only_vae, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
