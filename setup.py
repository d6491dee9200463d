import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

EMBEDDED = (Path("models/Wan2.1-T2V-nano"), Path("models/Wan2.2-TI2V-nano"), Path("examples/data"))
FIGURES = ["matplotlib>=3.8"]
EVAL = ["opencv-python-headless>=4.10", *FIGURES]
UI = ["gradio>=6.0", *FIGURES]
COMPLETION = ["shtab>=1.13"]
GGUF = ["gguf>=0.17"]
RAY = ["ray[client]>=2.40"]
BROWSER = ["selenium>=4.20"]
NOTEBOOK = ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"]
DEV = ["hypothesis>=6.100", "mypy>=1.15", "peft>=0.17", "pytest>=8", "pytest-xdist>=3", "ruff>=0.8"]


class BuildWithNano(build_py):
    """Puts the embedded model and the clips into the package; an editable install finds them in the clone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in EMBEDDED:
                target = Path(self.build_lib, "diffsynth", "embedded", folder.name)
                shutil.copytree(folder, target, dirs_exist_ok=True)


setup(
    name="fastvmt",
    version=re.search(r'__version__ = "(.+)"', Path("diffsynth/version.py").read_text())[1],
    description="Training-free video motion transfer with Wan2.1",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["diffsynth", "diffsynth.*"]),
    package_data={
        "diffsynth": [
            "py.typed",
            "cli/*.txt",
            "configs/*.json",
            "configs/*.pyi",
            "evaluation/*.safetensors",
            "models/*.json",
            "testing_data/*/*",
            "webui/*.css",
        ]
    },
    cmdclass={"build_py": BuildWithNano},
    entry_points={"console_scripts": ["fastvmt = diffsynth.__main__:start"]},
    install_requires=Path("requirements.txt").read_text().split(),
    extras_require={
        "eval": EVAL,
        "ui": UI,
        "completion": COMPLETION,
        "gguf": GGUF,
        "ray": RAY,
        "bench": ["diffusers>=0.33"],
        "dev": [*EVAL, *UI, *COMPLETION, *GGUF, *BROWSER, *NOTEBOOK, *DEV],
    },
)
