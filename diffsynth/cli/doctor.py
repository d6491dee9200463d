"""`fastvmt doctor`: whether everything that a run needs is installed, and which device it would use."""

import platform
import shutil
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffsynth.cli.console import DONE, FAILED, Console
from diffsynth.configs.checkpoints import PUBLISHED, checkpoint_folder
from diffsynth.data.ffmpeg import FfmpegError, check_ffmpeg
from diffsynth.jobs.download import missing_files
from diffsynth.version import __version__

NEEDED = ("torch", "numpy", "pillow", "einops", "safetensors", "tqdm", "ftfy", "tokenizers", "imageio-ffmpeg")
# Packages that not every run needs, and what needs them.
EXTRA = {
    "sentencepiece": "checkpoints without a tokenizer.json",
    "transformers": "fastvmt evaluate --clip",
    "modelscope": "fastvmt download",
    "huggingface-hub": "fastvmt download --source huggingface",
    "opencv-python-headless": "fastvmt evaluate",
    "matplotlib": "figures of losses and probes",
    "gradio": "fastvmt ui",
    "shtab": "fastvmt completion",
}
GIB = 2**30


def run(options: Namespace, console: Console) -> int:
    """Print what was found, and return 1 if something that every run needs is missing."""
    facts, problems = examine(options.models_dir)
    for heading, values in facts.items():
        console.say(heading.replace("_", " "))
        for name, value in values.items():
            console.say(f"  {name:<24}{value}")
    console.say("all that a run needs is here" if not problems else "problems")
    for problem in problems:
        console.say(f"  {problem}")
    console.result({**facts, "problems": problems})
    return FAILED if problems else DONE


def examine(models_dir: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the facts, by heading and name, and the problems."""
    versions = {"fastvmt": __version__, "python": platform.python_version()}
    versions |= {name: installed_version(name) or "missing" for name in NEEDED}
    problems = [f"package {n} is missing: pip install {n}" for n in NEEDED if versions[n] == "missing"]
    for name, purpose in EXTRA.items():
        versions[name] = installed_version(name) or f"not installed; needed for {purpose}"
    facts: dict[str, dict[str, Any]] = {"versions": versions}
    if installed_version("torch") is not None:
        facts |= _device()
    facts["ffmpeg"] = _ffmpeg(problems)
    facts["models"] = _models(models_dir, problems)
    return facts, problems


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> dict[str, dict[str, Any]]:
    import torch

    from diffsynth.models.attention import BACKENDS
    from diffsynth.runs.record import describe_device
    from diffsynth.vram_management import available_memory, choose_device, device_memory

    device = choose_device("auto")
    described = {**describe_device(device), "free memory": f"{available_memory(device) / GIB:.1f} GiB"}
    if device_memory(device):
        described["memory"] = f"{device_memory(device) / GIB:.1f} GiB"
        described["free memory of the CPU"] = f"{available_memory(torch.device('cpu')) / GIB:.1f} GiB"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    kernels = {
        name: backend.refusal(device.type, dtype, 128, needs_grad=False) or "usable"
        for name, backend in BACKENDS.items()
    }
    return {"device": described, "attention_kernels": kernels}


def _ffmpeg(problems: list[str]) -> dict[str, Any]:
    try:
        told = check_ffmpeg()
    except FfmpegError as error:
        problems.append(str(error))
        return {"program": "missing"}
    from imageio_ffmpeg import get_ffmpeg_exe

    return {"program": get_ffmpeg_exe(), "version": told}


def _models(models_dir: Path, problems: list[str]) -> dict[str, str]:
    models = {}
    try:
        models["nano"] = f"complete in {checkpoint_folder('nano')}"
    except FileNotFoundError as error:
        models["nano"] = "missing"
        problems.append(str(error))
    for name, checkpoint in PUBLISHED.items():
        folder = models_dir / checkpoint.folder
        missing = missing_files(folder, checkpoint)
        if not folder.is_dir():
            models[name] = f"not there; fetch it with: fastvmt download {name}"
        elif missing:
            faults = "; ".join(missing)
            models[name] = f"incomplete in {folder}: {faults}; go on with: fastvmt download {name}"
        else:
            models[name] = f"complete in {folder}"
    folder = next(p for p in (models_dir.absolute(), *models_dir.absolute().parents) if p.exists())
    models["free disk space"] = f"{shutil.disk_usage(folder).free / GIB:.1f} GiB"
    return models
