from setuptools import find_packages, setup

setup(
    name="fastvmt",
    version="0.1.0",
    description="Training-free video motion transfer with Wan2.1",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["diffsynth", "diffsynth.*"]),
    # The same list as requirements.txt; tests/test_structure.py compares them.
    install_requires=[
        "torch>=2.4",
        "numpy>=1.24",
        "pillow>=10",
        "einops>=0.7",
        "safetensors>=0.4.3",
        "tqdm>=4.64",
        "ftfy>=6.1",
        "tokenizers>=0.20",
        "transformers>=4.46",
        "sentencepiece>=0.2",
        "imageio-ffmpeg>=0.5",
        "modelscope>=1.15",
    ],
    extras_require={"dev": ["pytest>=8", "pytest-xdist>=3", "ruff>=0.8"]},
)
