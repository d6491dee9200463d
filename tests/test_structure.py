"""The house rules, checked over the source: sizes, imports, prints, literals, light start."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffsynth"
FILES = sorted(PACKAGE.rglob("*.py"))
# A room may import from itself and from rooms before it.
ROOMS = (
    "data", "prompters", "configs", "models", "schedulers", "vram_management", "motion", "pipelines",
    "distributed", "evaluation", "cli", "webui",
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


def test_imports_follow_the_order_in_which_data_meets_the_rooms():
    faults = []
    for file, node in nodes((ast.Import, ast.ImportFrom)):
        room = file.relative_to(PACKAGE).parts[0]
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in names:
            match = re.match(r"diffsynth\.(\w+)", name)
            if match and room in ROOMS and match[1] in ROOMS and ROOMS.index(match[1]) > ROOMS.index(room):
                faults.append(f"{where(file, node)} {room} imports {match[1]}")
    assert faults == []


def test_public_functions_have_docstrings_and_return_types():
    faults = []
    for file, node in nodes(ast.FunctionDef):
        public = not node.name.startswith("_") and node.col_offset == 0
        if public and (ast.get_docstring(node) is None or node.returns is None):
            faults.append(f"{where(file, node)} {node.name}")
    assert faults == []


@pytest.mark.parametrize("name", ["VideoData", "save_video", "ModelManager", "WanVideoPipeline"])
def test_public_names_import_without_the_heavy_packages(name):
    heavy = ["gradio", "ray", "cv2", "transformers", "modelscope", "diffusers", "triton", "sentencepiece"]
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


def test_requirements_and_setup_agree():
    setup = ast.parse((ROOT / "setup.py").read_text())
    call = next(node for node in ast.walk(setup) if isinstance(node, ast.Call) and node.func.id == "setup")
    required = next(ast.literal_eval(k.value) for k in call.keywords if k.arg == "install_requires")
    assert (ROOT / "requirements.txt").read_text().split() == required


def test_every_required_package_has_its_line_in_the_readme_and_a_tested_version():
    readme, constraints = ((ROOT / name).read_text() for name in ("README.md", "constraints.txt"))
    for line in (ROOT / "requirements.txt").read_text().split():
        package = re.match(r"[\w-]+", line)[0]
        assert re.search(rf"^\| {package} \|", readme, re.MULTILINE), (
            f"{package} is not in the README's table"
        )
        assert re.search(rf"^{package}==", constraints, re.MULTILINE), f"{package} is not in constraints.txt"


def test_every_test_that_the_docs_name_exists():
    for name, function in re.findall(
        r"`(test_\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "fidelity.md").read_text()
    ):
        source = ROOT / "tests" / name
        assert source.is_file(), name
        assert not function or f"def {function}(" in source.read_text(), f"{name}::{function}"
