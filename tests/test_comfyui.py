"""The ComfyUI nodes, loaded and called as ComfyUI does, with stubs of the modules that it offers."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.synthetic.clips import PLAIN, make_clip
from diffsynth import VideoData

FOLDER = Path(__file__).parent.parent / "examples" / "comfyui"
QUICK = {"steps": 2, "seed": 1, "mode": "effi_AMF"}


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """ComfyUI's own modules: (steps that its bar has shown, a flag that Cancel sets)."""
    shown, state = [], {"cancelled": False}

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, _preview=None):
            shown.append((value, total or self.total))

    def check():
        if state["cancelled"]:
            raise Interrupted

    modules = {
        name: ModuleType(name) for name in ("comfy", "comfy.utils", "comfy.model_management", "folder_paths")
    }
    modules["comfy.utils"].ProgressBar = ProgressBar
    modules["comfy.model_management"].throw_exception_if_processing_interrupted = check
    modules["folder_paths"].get_output_directory = lambda: str(tmp_path)
    modules["folder_paths"].models_dir = str(tmp_path / "models")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return shown, state


@pytest.fixture
def nodes(comfy):  # noqa: ARG001  # its modules must be there first
    """The classes by name, as ComfyUI's loader finds them."""
    spec = importlib.util.spec_from_file_location("custom_nodes.fastvmt", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    return module.NODE_CLASS_MAPPINGS


def call(node, **given):
    """Run a node: defaults for widgets that are not set, values checked by the bounds that it states."""
    stated = node.INPUT_TYPES()
    inputs = {}
    for name, (kind, *details) in {**stated["required"], **stated.get("optional", {})}.items():
        settings = details[0] if details else {}
        if name not in given:
            if isinstance(kind, list):
                inputs[name] = kind[0]
            elif "default" in settings:
                inputs[name] = settings["default"]
            else:
                assert name in stated.get("optional", {}), f"{name} is not connected"
            continue
        value = inputs[name] = given.pop(name)
        if isinstance(kind, list):
            assert value in kind
        if "min" in settings:
            assert settings["min"] <= value <= settings["max"]
    assert given == {}
    result = getattr(node(), node.FUNCTION)(**inputs)
    if not getattr(node, "OUTPUT_NODE", False):
        assert len(result) == len(node.RETURN_TYPES)
    return result


@pytest.fixture
def images():
    scene = {"shape": "circle", "colour": "red", "background": "white"}
    frames = make_clip(
        3, options=PLAIN, trajectory="line", num_frames=17, height=64, width=64, **scene
    ).frames
    return torch.from_numpy(frames).float() / 255


@torch.inference_mode()  # as ComfyUI calls all nodes
def test_a_graph_of_all_nodes_writes_a_video(nodes, comfy, images, tmp_path):
    (model,) = call(nodes["FastVMTLoadCheckpoint"], device="cpu")
    (reference,) = call(nodes["FastVMTMotionReference"], images=images)
    prompt = "a blue star on a yellow background"
    (made,) = call(nodes["FastVMTTransferMotion"], model=model, reference=reference, prompt=prompt, **QUICK)
    assert (made.shape, made.dtype) == ((17, 64, 64, 3), torch.float32)
    assert 0 <= made.min() < made.max() <= 1
    assert comfy[0] == [(1, 2), (2, 2)]
    direct = model(prompt, input_video=reference, seed=1, num_inference_steps=2, output_type="np")
    assert torch.equal((made * 255).round().to(torch.uint8), torch.from_numpy(direct))
    for number in (1, 2):
        shown = call(nodes["FastVMTSaveVideo"], images=made, fps=12.0)["ui"]["images"]
        assert shown == [{"filename": f"fastvmt_0000{number}.mp4", "subfolder": "", "type": "output"}]
    assert len(VideoData(tmp_path / "fastvmt_00002.mp4")) == 17


def test_cancel_ends_the_run(nodes, comfy):
    (model,) = call(nodes["FastVMTLoadCheckpoint"], device="cpu")
    comfy[1]["cancelled"] = True
    with pytest.raises(Interrupted):
        call(nodes["FastVMTTransferMotion"], model=model, prompt="a red star", mode="No_transfer", steps=2)
    comfy[1]["cancelled"] = False
    (made,) = call(
        nodes["FastVMTTransferMotion"], model=model, prompt="a red star", mode="No_transfer", steps=1
    )
    assert len(made) == 17


def test_what_is_missing_is_said(nodes, images):
    with pytest.raises(ValueError, match="needs 2 frames or more; got 1 of 17"):
        call(nodes["FastVMTMotionReference"], images=images, first=16)
    with pytest.raises(ValueError, match="the prompt is empty"):
        call(nodes["FastVMTTransferMotion"], model=None)
    with pytest.raises(FileNotFoundError, match=r"fastvmt download 14b --models-dir \S+/fastvmt"):
        call(nodes["FastVMTLoadCheckpoint"], model="14B")


def test_a_reference_is_a_part_of_the_pictures_without_their_opacity(nodes, images):
    clear = torch.cat([images, torch.zeros_like(images[..., :1])], -1)
    (reference,) = call(nodes["FastVMTMotionReference"], images=clear, first=2, count=5)
    assert reference.shape == (5, 64, 64, 3)
    assert torch.equal(torch.from_numpy(reference), (images[2:7] * 255).round().to(torch.uint8))
