"""ModelManager: loads the models of a checkpoint, keeps them, and merges LoRAs into the DiT."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffsynth.configs.checkpoints import PUBLISHED
from diffsynth.configs.fields import Choice, Kind, Number, OrNone, Whole, check_value
from diffsynth.models.checkpoint_files import (
    PUBLISHED_NAME,
    CheckpointError,
    StoredTensor,
    files_of,
    open_weights,
)
from diffsynth.models.lora import merge
from diffsynth.models.lora_files import Lora, checked_strength, read_lora
from diffsynth.models.model_kinds import (
    LOW_NOISE_DIT,
    PIECES,
    ModelKind,
    check_complete,
    expert_of,
    name_of,
    recognise,
    split,
)
from diffsynth.models.packed_linear import PACKED_DTYPES, PackedLinear, block_linears, pack_block_linears

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *PACKED_DTYPES)
# What a config.json may declare; no model needs more heads or text tokens.
DECLARED: dict[str, Kind] = {
    **dict.fromkeys(
        ("num_heads", "num_attention_heads", "attention_head_dim", "text_len"), Whole(1, 100_000)
    ),
    "eps": Number(above=0, most=0.01),
}
Entry = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded model, and what it was loaded from."""

    name: str  # of its kind
    model: nn.Module  # under official names, like its tensors
    tensors: dict[str, StoredTensor]  # of its files
    files: list[Path]  # one, or all shards
    pieces: StoredTensor | None = None  # bytes of a sentencepiece tokenizer, in a text encoder's file


class ModelManager:
    """Loads and keeps models.

    Args:
        torch_dtype: dtype in which weights are stored. With `torch.float8_e4m3fn` or `torch.int8`, only the
            linear layers of the repeated blocks are stored in eight bits; all else is stored in bfloat16, and
            all layers compute in it.
        device: where weights are put.
        file_path_list: entries to load immediately, as for `load_models`.
    """

    def __init__(
        self,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        file_path_list: Sequence[Entry] = (),
    ) -> None:
        self.torch_dtype = check_dtype(torch_dtype)
        self.device = torch.device(device)
        self.loaded: list[LoadedModel] = []
        self.loras: list[Lora] = []
        self.load_models(file_path_list)

    def load_models(
        self,
        file_path_list: Sequence[Entry],
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        vae_dtype: torch.dtype | None = None,
        model_names: Sequence[str] | None = None,
    ) -> None:
        """Load several entries.

        Args:
            file_path_list: entries, each a weight file, a list of the shards of one model, a `*.index.json`,
                or a folder in the official or diffusers layout, from which all recognised models are
                loaded.
            torch_dtype, device: override the manager's for these entries.
            vae_dtype: dtype of a VAE among them; by default torch_dtype.
            model_names: load models of these kinds only.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError (a ValueError): weights are damaged, incomplete or unknown; it names the file.
        """
        if isinstance(file_path_list, str | Path):
            raise TypeError(f"file_path_list must be a list of entries; got one path, {file_path_list!s}")
        for entry in file_path_list:
            self.load_model(entry, torch_dtype, device, vae_dtype, model_names)

    @torch.inference_mode(False)  # in which ComfyUI calls all nodes: guidance needs weights with gradients
    def load_model(
        self,
        entry: Entry,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        vae_dtype: torch.dtype | None = None,
        model_names: Sequence[str] | None = None,
    ) -> None:
        """Load one entry of `load_models`.

        Args:
            entry: a weight file, a list of shards, an index or a folder, as there.
            torch_dtype, device, vae_dtype, model_names: as there.
        """
        dtype = check_dtype(torch_dtype or self.torch_dtype)
        dtypes = {"wan_video_vae": check_dtype(vae_dtype or dtype)}
        in_folder = isinstance(entry, str | Path) and Path(entry).is_dir()
        loaded: dict[str, LoadedModel] = {}
        for files in files_of(entry):
            source = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
            declared = _declared(files[0].parent)
            try:
                models = [(held, recognise(held, declared, source)) for held in split(open_weights(files))]
            except CheckpointError as error:
                if not in_folder or PUBLISHED_NAME.fullmatch(files[0].name):
                    raise
                logger.warning("%s; left out", error)
                continue
            for held, (kind, tensors, arguments) in models:
                name = name_of(kind, files[0], model_names)
                if model_names is not None and name not in model_names:
                    continue
                if name in loaded:
                    logger.warning("%s is a second %s in the folder; left out", source, name)
                    continue
                model, stored = _build(kind, arguments, tensors, source), dtypes.get(name, dtype)
                if stored in PACKED_DTYPES:
                    pack_block_linears(model, stored)
                    stored = torch.bfloat16
                model = model.to(device=torch.device(device or self.device), dtype=stored)
                loaded[name] = LoadedModel(name, model, tensors, files, held.get(PIECES))
                same = [c.name for c in PUBLISHED.values() if c.dit_kwargs.items() <= arguments.items()]
                logger.info("%s: %s from %s", name, " or ".join(same) or "unpublished size", source)
        if not loaded:
            wanted = "Wan2.1 DiT, text encoder or VAE" if model_names is None else " or ".join(model_names)
            raise CheckpointError(f"{entry} holds no {wanted}")
        self.loaded.extend(loaded.values())

    def find(self, name: str) -> LoadedModel:
        """Return the loaded model of a kind; if there are several, the one loaded last.

        Args:
            name: "wan_video_dit", "wan_video_text_encoder", "wan_video_vae", "wan_video_image_encoder" or,
                for the second of two experts, "wan_video_low_noise_dit".

        Raises:
            ValueError: none is loaded; the message lists the models that are.
        """
        found = [entry for entry in self.loaded if entry.name == name]
        if not found:
            there = ", ".join(sorted({entry.name for entry in self.loaded})) or "nothing"
            raise ValueError(f"no model {name!r} is loaded; loaded: {there}")
        if len(found) > 1:
            logger.warning("%d models %r are loaded; the last one is used", len(found), name)
        return found[-1]

    def fetch_model(
        self, name: str, file_path: str | Path | None = None, require_model_path: bool = False
    ) -> Any:
        """Return the loaded model of a kind, the last of several; None, with a warning, if there is none.

        Args:
            name: as for `find`.
            file_path: a file of the model's weights, to choose among several models.
            require_model_path: return the tuple (model, list of its files).
        """
        for entry in reversed(self.loaded):
            if entry.name == name and (file_path is None or Path(file_path) in entry.files):
                return (entry.model, entry.files) if require_model_path else entry.model
        logger.warning("no model %r is loaded", name)
        return None

    def to(self, device: str | torch.device) -> None:
        """Move all loaded models."""
        for entry in self.loaded:
            entry.model.to(device)

    def load_lora(
        self,
        path: str | Path = "",
        lora_alpha: float = 1.0,
        *,
        file_path: str | Path = "",
        expert: str | None = None,
    ) -> None:
        """Add a LoRA file to the DiT at strength `lora_alpha`; several add up.

        Of two experts, it changes the one that its name says ("high_noise", "low_noise"), else both.

        Args:
            path, file_path: path of the file; the second is DiffSynth's name of the argument.
            lora_alpha: factor on the weight changes in the file.
            expert: "high" or "low" for a file whose name does not say it.

        Raises:
            FileNotFoundError: the file is missing.
            CheckpointError: the file is damaged, belongs to another model or expert, matches no layer, or is
                of an unsupported kind.
        """
        path = Path(path or file_path)
        expert = check_value("expert", OrNone(Choice(("high", "low"))), expert)
        dit, own = self.find("wan_video_dit"), expert_of(path)
        pair = any(entry.name == LOW_NOISE_DIT for entry in self.loaded)
        wanted = expert or (None if pair else expert_of(dit.files[0]))
        if own is not None and wanted not in (None, own):
            raise CheckpointError(f"LoRA {path} is of the {own}-noise expert, not of the {wanted}-noise one")
        names = {"high": [dit.name], "low": [LOW_NOISE_DIT], None: [dit.name, LOW_NOISE_DIT]}[expert or own]
        if pair and len(names) == 2:
            logger.info("LoRA %s does not name an expert: it changes both", path.name)
        dits = tuple(names) if pair else (dit.name,)
        lora = replace(read_lora(path, lora_alpha, dit.model), dits=dits)
        self.loras.append(lora)
        self._merge([lora])

    def change_lora(self, path: str | Path, lora_alpha: float) -> None:
        """Change the strength of a loaded LoRA file.

        Args:
            path: path of the file, as it was loaded.
            lora_alpha: new factor on its difference of the weights.

        Raises:
            ValueError: the file is not loaded, or lora_alpha is not a finite number.
        """
        changing = self._loaded_from(path)
        kept = {lora.dits: lora for lora in changing}.values()
        changed = [replace(lora, alpha=checked_strength(lora_alpha)) for lora in kept]
        self.loras = [lora for lora in self.loras if lora not in changing] + changed
        self._merge(changing)

    def unload_lora(self, path: str | Path | None = None) -> None:
        """Remove a LoRA file from the DiT (all of them by default).

        The weights are read from their files again, so they are bit-identical to those before the LoRA.

        Raises:
            ValueError: the file is not loaded.
        """
        leaving = list(self.loras) if path is None else self._loaded_from(path)
        self.loras = [lora for lora in self.loras if lora not in leaving]
        self._merge(leaving)

    @torch.inference_mode(False)
    def _merge(self, changed: Sequence[Lora]) -> None:
        """Set the layers that these LoRAs change anew, in each of their DiTs."""
        for name in dict.fromkeys(name for lora in changed for name in lora.dits):
            dit, loras = self.find(name), [lora for lora in self.loras if name in lora.dits]
            layers = {layer for lora in changed if name in lora.dits for layer in lora.layers}
            merge(dit.model, dit.tensors, loras, layers)

    def _loaded_from(self, path: str | Path) -> list[Lora]:
        found = [lora for lora in self.loras if lora.path == Path(path).resolve()]
        if not found:
            raise ValueError(f"LoRA {path} is not loaded; loaded: {[str(lora.path) for lora in self.loras]}")
        return found


def check_dtype(dtype: torch.dtype, allowed: Sequence[torch.dtype] = DTYPES) -> torch.dtype:
    """Return `dtype`; ValueError that names the allowed ones if it is another."""
    if dtype not in allowed:
        raise ValueError(f"torch_dtype must be one of {', '.join(map(str, allowed))}; got {dtype!r}")
    return dtype


def _declared(folder: Path) -> dict:
    """Return the content of the config.json beside the weights; {} if there is none."""
    config = folder / "config.json"
    if not config.is_file():
        return {}
    try:
        declared = json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{config} is not valid JSON ({error})") from error
    if not isinstance(declared, dict):
        raise CheckpointError(f"{config} does not hold a JSON object")
    try:
        for name in declared.keys() & DECLARED.keys():
            check_value(name, DECLARED[name], declared[name])
    except ValueError as error:
        raise CheckpointError(f"{config}: {error}") from error
    return declared


def _build(kind: ModelKind, arguments: dict, tensors: Mapping[str, StoredTensor], source: str) -> nn.Module:
    """Build a model on the meta device and assign it the memory-mapped weights."""
    with torch.device("meta"):
        try:
            model = kind.factory(**arguments)
        except ValueError as error:
            raise CheckpointError(f"{source} and the config.json beside it do not agree: {error}") from error
    check_complete(model, tensors, source)
    official: Callable[[str], str] = getattr(model, "official_key", str)
    linears = {official(f"{path}.weight"): (parent, name) for path, parent, name in block_linears(model)}
    packed = {key for key, tensor in tensors.items() if tensor.packed is not None and key in linears}
    state = {key: tensor.read() for key, tensor in tensors.items() if key not in packed}
    model.load_state_dict(state, strict=False, assign=True)
    for key in packed:
        parent, name = linears[key]
        unpacked = tensors[key].packed
        assert unpacked is not None  # by the definition of `packed` above
        setattr(parent, name, PackedLinear(unpacked(), getattr(parent, name)))
    return model.eval().requires_grad_(False)
