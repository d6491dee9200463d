"""The house rules, checked over the source: sizes, imports, prints, literals, light start."""

import ast
import importlib
import inspect
import re
import runpy
import subprocess
import sys
import traceback
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffsynth"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room may import from itself and from rooms before it.
ROOMS = (
    "data", "prompters", "configs", "models", "schedulers", "vram_management", "motion", "caches",
    "planning", "runs", "pipelines", "distributed", "evaluation", "jobs", "cli", "webui",
)  # fmt: skip
MAY_PRINT = ("cli", "webui")
MAY_NAME_CUDA = ("vram_management", "models/attention.py")
MUTABLE = (ast.List, ast.Dict, ast.Set)


def where(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{node.lineno}"


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...]):
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, kind):
                yield file, node


def below(file: Path, places: tuple[str, ...]) -> bool:
    return str(file.relative_to(PACKAGE)).startswith(places)


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of code: the public call has many documented arguments, which do not count."""
    has_docstring = ast.get_docstring(function) is not None
    code = function.body[1:] if has_docstring else function.body
    return function.end_lineno - code[0].lineno + 1 if code else 0


def test_a_picture_of_the_call_is_named_in_few_files():
    """So that a base model with another one touches few: command, batch, record and resume read PICTURES."""
    named = {
        file.name
        for file, node in nodes((ast.arg, ast.Constant))
        if "end_image" in (getattr(node, "arg", None), getattr(node, "value", None))
    }
    assert named == {"options.py", "components.py", "wan_video.py", "image_condition.py"}


def test_files_and_functions_are_short():
    long_files = [
        f"{file.name}: {n} lines" for file in FILES if (n := len(file.read_text().splitlines())) > 400
    ]
    functions = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    long_functions = [
        f"{where(file, node)} {node.name}: {n} lines"
        for file, node in functions
        if (n := body_lines(node)) > 80
    ]
    assert long_files + long_functions == []


def test_no_prints_star_imports_mutable_defaults_or_device_literals():
    faults = [
        where(file, node)
        for file, node in nodes(ast.Call)
        if getattr(node.func, "id", "") == "print" and not below(file, MAY_PRINT)
    ]
    faults += [where(file, node) for file, node in nodes(ast.ImportFrom) if node.names[0].name == "*"]
    for file, node in nodes(ast.arguments):
        faults += [
            where(file, default)
            for default in [*node.defaults, *node.kw_defaults]
            if isinstance(default, MUTABLE)
        ]
    faults += [
        where(file, node)
        for file, node in nodes(ast.Constant)
        if node.value == "cuda" and not below(file, MAY_NAME_CUDA)
    ]
    assert faults == []


def imported_files() -> dict[Path, set[Path]]:
    """Which file of the package imports which, inside of functions and under TYPE_CHECKING too."""
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    edges: dict[Path, set[Path]] = {file: set() for file in FILES}
    for file, node in nodes((ast.Import, ast.ImportFrom)):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(file, node)}: imports are absolute"
            names = [node.module, *(f"{node.module}.{name}" for name in names)]
        edges[file] |= {modules[name] for name in names if name in modules} - {file}
    return edges


def test_no_files_import_one_another_in_a_circle():
    edges = imported_files()
    left = {file for file in FILES if file.name != "__init__.py"}
    while free := {file for file in left if not edges[file] & left}:
        left -= free
    assert sorted(str(file.relative_to(ROOT)) for file in left) == [], "these form or lead into circles"


def test_imports_follow_the_order_in_which_data_meets_the_rooms():
    def rank(file: Path) -> int | None:
        room = file.relative_to(PACKAGE).parts[0]
        return ROOMS.index(room) if room in ROOMS else None

    rooms = {file.relative_to(PACKAGE).parts[0] for file in FILES if file.parent != PACKAGE}
    assert rooms <= set(ROOMS)
    faults = [
        f"{file.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for file, others in imported_files().items()
        for other in others
        if None not in (rank(file), rank(other)) and rank(other) > rank(file)
    ]
    assert faults == []


def test_only_the_faces_know_the_pipeline():
    faces = ("cli", "webui", "jobs", "evaluation", "distributed", "pipelines/wan_video.py", "__init__.py")
    faults = [
        where(file, node)
        for file, node in nodes(ast.ImportFrom)
        if any(alias.name == "WanVideoPipeline" for alias in node.names) and not below(file, faces)
    ]
    assert faults == []


def test_a_public_name_is_defined_in_one_file():
    defined: dict[str, list[str]] = {}
    for file, node in nodes((ast.FunctionDef, ast.ClassDef)):
        commands = below(file, ("cli", "webui")) and node.name == "run"
        if node.col_offset == 0 and not node.name.startswith("_") and not commands:
            defined.setdefault(node.name, []).append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


# Where code outside of the project finds what it calls, and the arguments that it may name.
PUBLIC_PLACES = {
    "models.wan_video_dit:WanModel": "dim in_dim ffn_dim out_dim text_dim freq_dim eps patch_size num_heads "
    "num_layers has_image_input text_len",
    "models.wan_video_dit:WanModel.forward": "x timestep context clip_feature y",
    "models.wan_video_dit:WanModel.features": "x timestep context block",
    "models.wan_video_dit_keys:dit_config_from_shapes": "shapes declared",
    "models.wan_video_vae:WanVideoVAE": "dim z_dim",
    "models.wan_video_vae:WanVideoVAE.encode": "video tiled tile_size tile_stride",
    "models.wan_video_vae:WanVideoVAE.decode": "latents tiled tile_size tile_stride",
    "models.wan_video_vae22:WanVideoVAE22": "dim dec_dim z_dim",
    "models.wan_video_image_encoder:WanImageEncoder": "",
    "models.wan_video_text_encoder:WanTextEncoder": "vocab dim dim_attn dim_ffn num_heads num_layers "
    "num_buckets",
    "models.wan_video_text_encoder:WanTextEncoder.forward": "ids mask",
    "pipelines.image_condition:image_condition": "vae image num_frames last_image",
    "pipelines.experts:is_high_noise": "timestep boundary",
    "schedulers:make_scheduler": "shift",
    "schedulers.flow_match:FlowMatchScheduler": "shift sigma_min extra_one_step",
    "schedulers.flow_match:FlowMatchScheduler.set_timesteps": "denoising_strength shift",
    "schedulers.flow_match:FlowMatchScheduler.add_noise": "",
    "schedulers.flow_match:FlowMatchScheduler.step": "",
    "motion:MotionGuidance": "block window tile tau sf guided_steps inner_steps interval lr amf_weight "
    "window_weight",
    "motion:MotionGuidance.released": "",
    "motion:attention_motion_flow": "q k sf tau",
    "motion:tile_motion_flow": "q k sf window tile tau windows",
    "testing:write_checkpoint": "directory size seed",
    "ModelManager": "torch_dtype device",
    "ModelManager.load_models": "torch_dtype",
    "ModelManager.load_lora": "lora_alpha",
    "ModelManager.unload_lora": "path",
    "ModelManager.fetch_model": "",
    "WanVideoPipeline.from_model_manager": "torch_dtype device",
    "WanVideoPipeline.from_pretrained": "device",
    "WanVideoPipeline.enable_vram_management": "num_persistent_param_in_dit",
    "VideoData": "video_file image_folder height width fps start end",
    "save_video": "fps quality",
    "save_frames": "",
}


@pytest.mark.parametrize("place", PUBLIC_PLACES)
def test_public_names_keep_their_places_and_arguments(place):
    module, _, name = place.rpartition(":")
    found = importlib.import_module(f"diffsynth.{module}" if module else "diffsynth")
    for part in name.split("."):
        found = getattr(found, part)
    assert set(PUBLIC_PLACES[place].split()) <= set(signature(found).parameters)


def test_configs_need_no_torch():
    modules = [f"diffsynth.configs.{file.stem}" for file in FILES if file.parent.name == "configs"]
    imports = f"[importlib.import_module(name) for name in {modules}]"
    code = f"import sys, importlib; {imports}; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_the_types_of_the_call_are_those_of_its_options():
    from diffsynth import WanVideoPipeline
    from diffsynth.configs.options import call_options

    types = runpy.run_path(str(PACKAGE / "configs" / "call_types.pyi"))
    assert set(types["CallOptions"].__annotations__) == set(call_options())
    named = {p.name for p in signature(WanVideoPipeline.run).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(types["CallArguments"].__annotations__) == (set(call_options()) - {"output_type"}) | named


@pytest.mark.parametrize("name", ["MotionGuidance", "RunOptions", "CacheOptions", "FileOptions"])
def test_help_lists_the_options_one_a_line(name):
    from diffsynth.configs import options

    owner = getattr(options, name)
    lines = inspect.getdoc(owner).split("Options:\n")[1].splitlines()
    assert [line.split(" = ")[0].strip() for line in lines] == list(options.options_of(owner))
    code = "import inspect; from diffsynth import MotionGuidance as M; print('sf = 4' in inspect.getdoc(M))"
    if name == "MotionGuidance":
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True"


def test_help_of_the_call_lists_its_arguments_and_has_an_example():
    from diffsynth import MotionGuidance, WanVideoPipeline

    told = inspect.getdoc(WanVideoPipeline.__call__)
    for name in ("prompt", "input_video", "checkpoint_dir", "arguments"):
        assert re.search(rf"^    {name}.*: ", told, re.MULTILINE)
    assert "\nExample:\n    frames = pipe(" in told
    assert "pipe = WanVideoPipeline.from_pretrained(" in WanVideoPipeline.__doc__
    assert "Example: `pipe(..., motion=MotionGuidance(" in MotionGuidance.__doc__


@pytest.mark.slow
def test_a_wrong_argument_of_the_call_is_found_by_a_type_checker(tmp_path):
    calls = {
        'frames: list[Image] = pipe("a fox", num_inference_steps=3, input_image="fox.png")': None,
        'pixels: torch.Tensor = pipe("a fox", output_type="pt")': None,
        'pipe("a fox", num_inference_stepz=3)': 'did you mean "num_inference_steps"',
        'pipe("a fox", seed="7")': "No overload variant",
        'frames = pipe("a fox", output_type="np")': "Incompatible types in assignment",
    }
    head = "import torch\nfrom PIL.Image import Image\nfrom diffsynth import WanVideoPipeline\n"
    script = tmp_path / "calls.py"
    script.write_text(head + 'pipe = WanVideoPipeline.from_pretrained("nano")\n' + "\n".join(calls))
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(script)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600).stdout
    for line, (call, error) in enumerate(calls.items(), start=5):
        found = [text for text in told.splitlines() if f"calls.py:{line}: error" in text]
        assert (error is None and not found) or (found and error in found[0]), (call, told[:2000])


def test_the_loss_is_at_most_ten_frames_below_the_call(tiny_checkpoint, monkeypatch):
    from diffsynth import WanVideoPipeline
    from diffsynth.motion import amf

    depths = []

    class ReachedError(Exception):
        pass

    def count(*_args, **_kwargs):
        stack = [Path(frame.filename) for frame in traceback.extract_stack()]
        depths.append(sum(file.is_relative_to(PACKAGE) for file in stack))
        raise ReachedError

    monkeypatch.setattr(amf, "amf_loss", count)
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    clip = np.zeros((5, 32, 32, 3), np.uint8)
    for mode in ("effi_AMF", "AMF"):
        with pytest.raises(ReachedError):
            pipe("a cat", input_video=clip, mode=mode, num_inference_steps=1, progress_bar_cmd=iter)
    assert max(depths) <= 10


def test_public_functions_have_docstrings_and_return_types():
    faults = []
    for file, node in nodes(ast.FunctionDef):
        public = not node.name.startswith("_") and node.col_offset == 0
        if public and (ast.get_docstring(node) is None or node.returns is None):
            faults.append(f"{where(file, node)} {node.name}")
    assert faults == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["VideoData", "save_video", "ModelManager", "WanVideoPipeline"])
def test_public_names_import_without_the_heavy_packages(name):
    heavy = ["gradio", "ray", "cv2", "transformers", "modelscope", "diffusers", "triton", "sentencepiece"]
    heavy += ["matplotlib", "shtab"]
    code = f"import sys; from diffsynth import {name}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing_else():
    code = "import sys, diffsynth; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_unknown_public_name_is_an_attribute_error():
    import diffsynth

    with pytest.raises(AttributeError, match="no attribute 'WanPipeline'"):
        diffsynth.WanPipeline  # noqa: B018


def test_every_required_package_has_its_line_in_the_documents_and_a_tested_version():
    layout, constraints = ((ROOT / name).read_text() for name in ("docs/layout.md", "constraints.txt"))
    for line in (ROOT / "requirements.txt").read_text().split():
        package = re.match(r"[\w-]+", line)[0]
        assert re.search(rf"^\| {package} \|", layout, re.MULTILINE), (
            f"{package} is not in the table of docs/layout.md"
        )
        assert re.search(rf"^{package}==", constraints, re.MULTILINE), f"{package} is not in constraints.txt"


def test_every_test_that_the_docs_name_exists():
    for name, function in re.findall(
        r"`(test_\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "fidelity.md").read_text()
    ):
        source = ROOT / "tests" / name
        assert source.is_file(), name
        assert not function or f"def {function}(" in source.read_text(), f"{name}::{function}"
