"""`fastvmt doctor`: what is installed, what the device can do, and whether it computes what it should."""

import math
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
_NOT_READY = ("not there", "incomplete")


def run(options: Namespace, console: Console) -> int:
    """Print what was found, and return 1 if something that every run needs is missing or computes wrongly.

    With --device, the self-test runs there.

    Raises:
        ValueError: there is no such device.
    """
    versions = {"fastvmt": __version__, "python": platform.python_version()}
    versions |= {name: installed_version(name) or "missing" for name in NEEDED}
    problems = [f"package {n} is missing: pip install {n}" for n in NEEDED if versions[n] == "missing"]
    for name, purpose in EXTRA.items():
        versions[name] = installed_version(name) or f"not installed; needed for {purpose}"
    facts: dict[str, dict[str, Any]] = {"versions": versions}
    if versions["torch"] != "missing":
        facts |= _device(options.device or "auto")
    try:
        facts["ffmpeg"] = {"version": check_ffmpeg()}
        from imageio_ffmpeg import get_ffmpeg_exe

        facts["ffmpeg"]["program"] = get_ffmpeg_exe()
    except FfmpegError as error:
        problems.append(str(error))
        facts["ffmpeg"] = {"program": "missing"}
    facts["models"] = _models(options.models_dir, problems)
    for heading, values in facts.items():
        console.say(heading.replace("_", " "))
        for name, value in values.items():
            console.say(f"  {name:<24}{value}")
    table = [] if options.device is None else _self_test(options.device, problems, console)
    missing = [f"{name} is {told}" for name, told in facts["models"].items() if told.startswith(_NOT_READY)]
    if facts.get("device", {}).get("type") == "cpu":
        missing.append("no GPU is used: the published models take hours on a CPU")
    for heading, lines in (("problems", problems), ("not ready", missing)):
        console.say(heading if lines else f"{heading}: none")
        for line in lines:
            console.say(f"  {line}")
    console.result({**facts, "self_test": table, "problems": problems, "not_ready": missing})
    return FAILED if problems else DONE


def _self_test(name: str, problems: list[str], console: Console) -> list[dict[str, Any]]:
    """Run the self-test on a device, tell its table, and add what failed to the problems."""
    from diffsynth.evaluation.self_test import HEADING, WIDE_DTYPES, dtype_refusal, self_test
    from diffsynth.vram_management import choose_device

    device, table = choose_device(name), []
    refused = {dtype: dtype_refusal(device, dtype) for dtype in WIDE_DTYPES}
    console.say(f"self-test on {device}\n{HEADING}")
    for result in self_test(device, [dtype for dtype in WIDE_DTYPES if not refused[dtype]]):
        console.say(str(result))
        error = result.error if math.isfinite(result.error) else None  # JSON has no infinity
        table.append({**result._asdict(), "error": error})
        if result.failed:
            problems.append(f"self-test: {result.stage} in {result.dtype} is wrong on {device}")
    for dtype, reason in refused.items():
        if reason:
            console.say(f"{dtype} does not work on {device}: {reason}")
    return table


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(name: str) -> dict[str, dict[str, Any]]:
    import torch

    from diffsynth.models.attention import BACKENDS
    from diffsynth.runs.record import describe_device
    from diffsynth.vram_management import available_memory, choose_device, choose_dtype, device_memory

    device = choose_device(name)
    described = {**describe_device(device), "free memory": f"{available_memory(device) / GIB:.1f} GiB"}
    if device_memory(device):
        described["memory"] = f"{device_memory(device) / GIB:.1f} GiB"
        described["free memory of the CPU"] = f"{available_memory(torch.device('cpu')) / GIB:.1f} GiB"
    dtype = choose_dtype(device)
    refusals = {name: b.refusal(device.type, dtype, 128, needs_grad=False) for name, b in BACKENDS.items()}
    kernels = {name: refusal or "usable" for name, refusal in refusals.items()}
    return {"device": described, "attention_kernels": kernels}


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
            models[name] = f"incomplete in {folder}: {faults}; continue with: fastvmt download {name}"
        else:
            models[name] = f"complete in {folder}"
    folder = next(p for p in (models_dir.absolute(), *models_dir.absolute().parents) if p.exists())
    models["free disk space"] = f"{shutil.disk_usage(folder).free / GIB:.1f} GiB"
    return models
