"""Which weights are where while a stage runs, and which memory they rest in."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from diffsynth import ModelManager
from diffsynth.configs.options import RunOptions
from diffsynth.planning import ladder
from diffsynth.testing import write_checkpoint
from diffsynth.vram_management import Residency, residency
from diffsynth.vram_management.streaming import tensors_of

CPU = torch.device("cpu")


@pytest.fixture
def models(monkeypatch):
    """Two models for a device that is CPU memory of its own: what comes there is a copy."""
    monkeypatch.setattr(residency, "copy_to", lambda _device, tensor: tensor.clone())
    torch.manual_seed(0)
    return {name: nn.Linear(3, 2).requires_grad_(False) for name in ("dit", "vae")}


def test_offloaded_weights_come_for_their_stage_and_rest_where_they_were(models):
    resident = Residency(models, CPU)
    resident.offload = True
    weight, other = (models[name].weight.data_ptr() for name in ("dit", "vae"))
    values = models["dit"].weight.clone()
    for _ in range(2):
        with resident.using("dit"):
            assert models["dit"].weight.data_ptr() != weight
            assert models["vae"].weight.data_ptr() == other
        assert models["dit"].weight.data_ptr() == weight
    assert torch.equal(models["dit"].weight, values)


def test_weights_rest_where_they_were_after_an_error_too(models):
    resident = Residency(models, CPU)
    resident.offload = True
    weight = models["dit"].weight.data_ptr()
    with pytest.raises(RuntimeError, match="in the stage"), resident.using("dit"):
        raise RuntimeError("in the stage")
    assert models["dit"].weight.data_ptr() == weight


def test_without_offload_weights_stay_on_the_device(models):
    resident = Residency(models, CPU)
    weight = models["dit"].weight.data_ptr()
    with resident.using("dit"):
        there = models["dit"].weight.data_ptr()
    assert models["dit"].weight.data_ptr() == there != weight


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux, which lists what is mapped")
def test_weights_stored_in_their_dtype_are_mapped_from_the_file(tmp_path):
    folder = write_checkpoint(tmp_path)
    manager = ModelManager(device="cpu")
    manager.load_models([folder], torch_dtype=torch.float32)
    dit = manager.fetch_model("wan_video_dit")
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in maps if str(folder) in line]
    spans = [(int(first, 16), int(last, 16)) for first, last in mapped]
    assert all(any(a <= t.data_ptr() < b for a, b in spans) for t in dit.blocks.parameters())


def test_weights_mapped_from_files_are_mapped_again_after_memory_ran_out(tmp_path, monkeypatch):
    manager = ModelManager(device="cpu")
    manager.load_models([write_checkpoint(tmp_path)], torch_dtype=torch.float32, vae_dtype=torch.float32)
    names = {"dit": "wan_video_dit", "vae": "wan_video_vae"}
    models = {name: manager.fetch_model(kind) for name, kind in names.items()}

    def storages():
        return [t.untyped_storage() for model in models.values() for t in tensors_of(model)]

    mapped = storages()
    monkeypatch.setattr(residency, "copy_to", lambda _device, tensor: tensor.clone())
    rungs = ladder.following
    monkeypatch.setattr(
        ladder, "following", lambda *now, **facts: rungs(*now, **{**facts, "accelerator": True})
    )
    resident = Residency(models, CPU)
    for name in models:
        with resident.using(name):
            pass
    copies = [weakref.ref(storage) for storage in storages()]
    assert all(copy() not in (None, storage) for copy, storage in zip(copies, mapped, strict=True))
    ladder.Ladder(resident, models["vae"]).next("sampling", RunOptions(batch_cfg=False), "no memory")
    assert resident.offload
    assert all(now is before for now, before in zip(storages(), mapped, strict=True)), "nothing was copied"
    assert all(copy() is None for copy in copies)


def replace_weight(layer):
    for _ in range(2):  # the second may stand where the copy was
        layer.weight.data = layer.weight.data + 1


def change_weight(layer):
    layer.weight.add_(2)


@pytest.mark.parametrize("change", [replace_weight, change_weight])
@pytest.mark.parametrize("offload", [False, True])
def test_weights_that_were_changed_on_the_device_keep_the_change(models, change, offload):
    resident = Residency(models, CPU)
    expected, bias = models["dit"].weight + 2, models["dit"].bias.data_ptr()
    resident.offload = True
    with resident.using("dit"):
        resident.offload = offload
        change(models["dit"])
        weight = models["dit"].weight.clone()
    resident.rest()
    assert torch.equal(models["dit"].weight, weight)
    assert torch.equal(weight, expected)
    assert models["dit"].bias.data_ptr() == bias
