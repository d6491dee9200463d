"""The state of a run in one file: tensors as safetensors, plain numbers as JSON in its metadata; no pickle.

Files are written beside their place and moved there when they are complete and on the disk, so that a kill or
a full disk leaves the last good one.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsynth.data.files import written_whole
from diffsynth.models.conditions import NO_CONDITION, ImageCondition

FORMAT = 1


class PromptEmbeddings(NamedTuple):
    """Text embeddings [1, text_len, text_dim] of the prompt, the negative and the empty prompt (null).

    Those that a run does not read are None.
    """

    positive: Tensor
    negative: Tensor | None = None
    null: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """The inputs of denoising, on the device.

    Attributes:
        prompts: text embeddings, one entry a prompt.
        noise: [1, C, F, h, w].
        reference: latents of the reference in the shape of noise; None without one.
        seconds: duration of each stage that made them; memory: bytes, as in `RunCost.stage_memory`.
        condition: condition from the pictures of the run.
        reference_condition: condition from the reference's frames in the places of these pictures.
    """

    prompts: list[PromptEmbeddings]
    noise: Tensor
    reference: Tensor | None
    seconds: Mapping[str, float]
    memory: Mapping[str, dict[str, int]] = field(default_factory=dict)
    condition: ImageCondition = NO_CONDITION
    reference_condition: ImageCondition = NO_CONDITION


@dataclass(frozen=True, kw_only=True, slots=True)
class StepState:
    """A run between two denoising steps; its tensors are never changed in place.

    Attributes:
        step: number of finished steps.
        latents: [1, C, F, h, w] after these steps.
        parts: states of scheduler, gradient memory and step caches, by name.
        cost: state of `RunCost`.
        settings: values of the options that a lack of memory may change (see `planning.ladder`).
    """

    step: int
    latents: Tensor
    parts: Mapping[str, object]
    cost: Mapping[str, object]
    settings: Mapping[str, object]


def joined(states: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Join states by name into one, with entries named "name.entry"."""
    return {f"{name}.{entry}": value for name, state in states.items() for entry, value in state.items()}


def part(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the state that `joined` stored under a name; empty if there is none."""
    start = f"{name}."
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}


def save_state(path: Path, state: Mapping[str, object], facts: Mapping[str, object]) -> None:
    """Write a state of tensors and plain numbers, and facts about it that JSON can hold.

    Raises:
        OSError: the file cannot be written; an existing one stays, as it does after a ValueError.
        ValueError: a tensor is not finite.
    """
    from safetensors.torch import save

    # Copies: safetensors refuses tensors that share memory, as a gradient kept under two names does.
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    _check_finite(tensors)
    numbers = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    text = json.dumps({"format": FORMAT, "numbers": numbers, "facts": facts})
    metadata = {"fastvmt": text, "crc32": _checksum(text, tensors)}
    with written_whole(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def load_state(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state, with tensors on a device, and the facts that `save_state` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is of another kind, damaged, or holds tensors that are not finite.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no state file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no state file: {error}") from error
    text = metadata.get("fastvmt")
    if text is None or metadata.get("crc32") != _checksum(text, tensors):
        raise ValueError(f"{path} is damaged or no state file: its checksum does not fit")
    content = json.loads(text)
    if content["format"] != FORMAT:
        raise ValueError(f"{path} is of format {content['format']}; this version reads format {FORMAT}")
    _check_finite(tensors, f"{path}: ")
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return {**moved, **content["numbers"]}, content["facts"]


def _check_finite(tensors: Mapping[str, Tensor], where: str = "") -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}{name} holds values that are not finite")


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of the JSON and of the names, types, shapes and values of all tensors."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        head = f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}"
        crc = zlib.crc32(head.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
