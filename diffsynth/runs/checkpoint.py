"""The folder of a saved run (checkpoint_dir): its files, when they are written, and how a run resumes.

inputs.safetensors          text embeddings, reference latents and noise, once they are made
step.safetensors            state after the last saved step, replaced at each save
latents-KEY-001.safetensors final latents of each prompt; KEY is a hash of arguments and weights. These
                            files are kept; the others are deleted when the run is done.
rung.json                   memory settings with which ranks start again after one ran out of memory
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffsynth.configs.options import RunOptions, SavingOptions
from diffsynth.data.files import PARTIAL, locked
from diffsynth.models.conditions import ImageCondition
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import identity_differences, identity_key, run_identity
from diffsynth.runs.signals import stoppable
from diffsynth.runs.state import PromptEmbeddings, RunInputs, StepState, joined, load_state, part, save_state
from diffsynth.vram_management import Residency

logger = logging.getLogger(__name__)

INPUTS, STEP, RUNG, LOCK = "inputs.safetensors", "step.safetensors", "rung.json", ".lock"
LATENTS = "latents-{key}-{number:03d}.safetensors"


def saved_seed(folder: Path) -> int | None:
    """Return the seed of the unfinished run in a folder; None if there is none."""
    path = folder / INPUTS
    return load_state(path)[1]["seed"] if path.exists() else None


class SavedRun:
    """A run that is saved in a folder. A file that cannot be written causes a warning, and the run continues.

    Attributes:
        inputs: inputs of denoising; None in a new run until `keep_inputs`.

    Raises:
        ValueError: the folder holds damaged files, or an unfinished run of another identity; the message says
            what differs.
    """

    def __init__(
        self,
        folder: Path,
        saving: SavingOptions,
        identity: Mapping[str, str],
        seed: int,
        device: torch.device,
    ) -> None:
        self._folder, self._saving, self._seed, self._device = folder, saving, seed, device
        self._identity = dict(identity)
        self._key = identity_key(identity)
        self.inputs: RunInputs | None = None
        self._inputs_saved = self._warned = False
        self._index = 0
        self._latest: StepState | None = None  # the last finished step, if unsaved
        self._last_saved = (0, time.monotonic())
        for partial in folder.glob(f"{PARTIAL}*"):
            partial.unlink(missing_ok=True)
        if not saving.resume:
            self.done()
        elif (folder / INPUTS).exists():
            self._load_inputs()

    def keep_inputs(self, inputs: RunInputs) -> None:
        """Save the inputs of denoising, before the first step."""
        self.inputs = inputs
        self._save_inputs()

    def finished(self, index: int, cost: RunCost) -> Tensor | None:
        """Return the final latents of prompt `index` (0-based) if it is done, and restore their cost."""
        path = self._latents_path(index)
        if not path.exists() or not self._saving.resume:
            return None
        state, facts = load_state(path, self._device)
        logger.info("prompt %d is done: its latents are in %s", index + 1, path)
        cost.restore(facts["cost"])
        return state["latents"]

    def begun(self, index: int) -> StepState | None:
        """Return the state from which prompt `index` (0-based) continues; None if no step is saved."""
        self._index, self._latest = index, None
        self._last_saved = (0, time.monotonic())
        path = self._folder / STEP
        if not self._inputs_saved or not path.exists():
            return None
        state, facts = load_state(path, self._device)
        if facts["key"] != self._key or facts["index"] != index:
            return None
        logger.info("continuing after step %d of prompt %d, from %s", facts["step"], index + 1, path)
        self._last_saved = (facts["step"], time.monotonic())
        facts = {name: facts[name] for name in ("step", "cost", "settings")}
        return StepState(latents=state["latents"], parts=part(state, "parts"), **facts)

    def step_done(self, state: StepState) -> None:
        """Record a finished step, and save it if the last save is long enough ago."""
        self._latest = state
        step, moment = self._last_saved
        minutes = (time.monotonic() - moment) / 60
        if state.step - step >= self._saving.checkpoint_every or minutes >= self._saving.checkpoint_minutes:
            self.keep_latest()

    def keep_latest(self) -> None:
        """Save the last finished step, if it is not saved yet."""
        state = self._latest
        if state is None or not self._save_inputs():
            return
        self._last_saved = (state.step, time.monotonic())
        tensors = {"latents": state.latents, **joined({"parts": state.parts})}
        facts = {"step": state.step, "cost": state.cost, "settings": state.settings}
        if self._write(STEP, tensors, {"key": self._key, "index": self._index, **facts}):
            self._latest = None

    def keep_latents(self, index: int, latents: Tensor, facts: Mapping[str, object]) -> None:
        """Save the final latents of prompt `index` (0-based)."""
        if self._write(self._latents_path(index).name, {"latents": latents}, facts):
            self._latest = None

    def done(self) -> None:
        """Remove the files that only an unfinished run needs."""
        self._latest = None
        with suppress(OSError):  # the next run overwrites or rejects a file that remains
            for name in (STEP, INPUTS, RUNG):
                (self._folder / name).unlink(missing_ok=True)

    def _latents_path(self, index: int) -> Path:
        return self._folder / LATENTS.format(key=self._key, number=index + 1)

    def _load_inputs(self) -> None:
        path = self._folder / INPUTS
        state, facts = load_state(path, self._device)
        if different := identity_differences(facts["identity"], self._identity):
            raise ValueError(
                f"checkpoint_dir {self._folder} holds an unfinished run that differs in "
                f"{', '.join(different)}; pass the same values to continue it, resume=False to discard "
                "it, or another folder"
            )
        prompts = [PromptEmbeddings(**part(state, f"context.{i}")) for i in range(facts["prompts"])]
        self.inputs = RunInputs(
            prompts=prompts, noise=state["noise"], reference=state.get("reference"), seconds=facts["seconds"],
            condition=ImageCondition(**part(state, "condition")),
            reference_condition=ImageCondition(**part(state, "reference_condition")),
        )  # fmt: skip
        self._inputs_saved = True
        logger.info("continuing the run in %s", self._folder)

    def _save_inputs(self) -> bool:
        inputs = self.inputs
        if not self._inputs_saved and inputs is not None:
            contexts = {f"context.{i}": c._asdict() for i, c in enumerate(inputs.prompts)}
            contexts["condition"] = inputs.condition._asdict()
            contexts["reference_condition"] = inputs.reference_condition._asdict()
            tensors = {**joined(contexts), "noise": inputs.noise, "reference": inputs.reference}
            tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            facts = {"identity": self._identity, "seed": self._seed, "prompts": len(inputs.prompts)}
            facts["seconds"] = dict(inputs.seconds)
            # Until the inputs are saved, step.safetensors may be an earlier run's and is ignored.
            self._inputs_saved = self._write(INPUTS, tensors, facts)
        return self._inputs_saved

    def _write(self, name: str, state: Mapping[str, object], facts: Mapping[str, object]) -> bool:
        path = self._folder / name
        try:
            save_state(path, state, facts)
        except (OSError, ValueError) as error:
            if not self._warned:
                logger.warning("the run continues, but %s is not saved: %s", path, error)
            self._warned = True
            return False
        return True


@contextmanager
def open_run(
    folder: Path | None,
    saving: SavingOptions,
    residency: Residency,
    prompts: Sequence[tuple[str, str]],
    pixels: Tensor | None,
    pictures: Mapping[str, Image.Image],
    options: RunOptions,
    stop_run: Callable[[], None],
) -> Iterator[SavedRun | None]:
    """Yield the saved run of a folder; on exit, also after an error, save its last finished step.

    Raises:
        ValueError: another run uses the folder, or the folder holds an unfinished run that differs.
        RunInterrupted: SIGINT or SIGTERM arrived.
    """
    if folder is None:
        yield None
        return
    with run_lock(folder), stoppable(folder, stop_run):
        identity = run_identity(residency.models, prompts, pixels, pictures, options)
        saved = SavedRun(folder, saving, identity, options.seed, residency.device)
        try:
            yield saved
        finally:
            saved.keep_latest()


def run_lock(folder: Path) -> AbstractContextManager[None]:
    """Return a context that locks a run's folder; entering raises ValueError if another run uses it."""
    return locked(folder / LOCK, f"checkpoint_dir {folder} is in use by another run")


def clear_checkpoints(folder: str | Path) -> None:
    """Remove only the files of saved runs, final latents included; call it once the videos are written.

    Raises:
        ValueError: a run is using the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    with run_lock(folder):
        for pattern in (INPUTS, STEP, RUNG, "latents-*-*.safetensors", f"{PARTIAL}*"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
