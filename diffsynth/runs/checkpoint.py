"""A run's folder, its checkpoint_dir: what is written there, when, and what a later call goes on with.

inputs.safetensors          text embeddings, reference latents and noise, once they are made
step.safetensors            the run after one of its steps, replaced as it goes on
latents-KEY-001.safetensors the final latents of each prompt, before they are decoded; KEY stands for
                            arguments and weights. They stay; the other two go when the run is done.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.data.frames import checked_int
from diffsynth.runs.contexts import Contexts
from diffsynth.runs.identity import differences, identity_key
from diffsynth.runs.state import PARTIAL, RunInputs, StepState, joined, load_state, part, save_state

logger = logging.getLogger(__name__)

INPUTS, STEP, LOCK = "inputs.safetensors", "step.safetensors", ".lock"
LATENTS = "latents-{key}-{number:03d}.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """Where and how often a run is saved.

    folder: made if it is missing. every: steps. minutes: at the first step's end after so many, if that comes
    before. resume: go on with an unfinished run of the same arguments; False discards any unfinished one.
    Raises ValueError, naming the argument of the pipeline's call, for what is not allowed, and for a folder
    that cannot be written to.
    """

    folder: Path
    every: int = 5
    minutes: float = 2.0
    resume: bool = True

    def __post_init__(self) -> None:
        checked_int("checkpoint_every", self.every)
        minutes = self.minutes
        if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not minutes > 0:
            raise ValueError(f"checkpoint_minutes must be a number above 0; got {minutes!r}")
        trial = self.folder / f"{PARTIAL}trial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(b"0")
            trial.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"checkpoint_dir {self.folder} cannot be written to: {error}") from error

    def seed(self) -> int | None:
        """The seed of the unfinished run that is there to be gone on with, if any."""
        if not self.resume or not (self.folder / INPUTS).exists():
            return None
        return load_state(self.folder / INPUTS)[1]["seed"]


def saving_options(folder: str | Path | None, every: int, minutes: float, resume: bool) -> Saving | None:
    """`Saving` from the arguments of the pipeline's call; None if nothing is to be saved."""
    if folder is None:
        return None
    return Saving(folder=Path(folder).expanduser(), every=every, minutes=minutes, resume=resume)


class RunStore(Protocol):
    """What a run needs of the place that it is saved to."""

    def inputs(self) -> RunInputs | None:
        """Those of the run that is gone on with."""

    def keep_inputs(self, inputs: RunInputs) -> None:
        """Save them, before the first step."""

    def finished(self, index: int) -> tuple[Tensor, Mapping[str, object]] | None:
        """Final latents and cost of a prompt, from 0, if it is done."""

    def begun(self, index: int) -> StepState | None:
        """The state to go on with of a prompt that is about to be denoised."""

    def step_done(self, state: StepState) -> None:
        """Told after each step."""

    def keep_latents(self, index: int, latents: Tensor, facts: Mapping[str, object]) -> None:
        """Save the final latents of a prompt."""

    def done(self) -> None:
        """The whole run is done."""


class NoStore:
    """For a run that is not saved."""

    def inputs(self) -> None:
        return None

    def keep_inputs(self, inputs: RunInputs) -> None: ...

    def finished(self, index: int) -> None:  # noqa: ARG002
        return None

    def begun(self, index: int) -> None:  # noqa: ARG002
        return None

    def step_done(self, state: StepState) -> None: ...

    def keep_latents(self, index: int, latents: Tensor, facts: Mapping[str, object]) -> None: ...

    def done(self) -> None: ...


class SavedRun:
    """A `RunStore` in a folder. Files that cannot be written cost a warning, not the run.

    identity: see `run_identity`. Raises ValueError if the folder holds an unfinished run of another identity,
    which it tells by name, or files that are damaged.
    """

    def __init__(self, saving: Saving, identity: Mapping[str, str], seed: int, device: torch.device) -> None:
        self._saving, self._identity, self._seed, self._device = saving, dict(identity), seed, device
        self._key = identity_key(identity)
        self._inputs: RunInputs | None = None
        self._inputs_saved = False
        self._index = 0
        self._latest: StepState | None = None  # not saved yet
        self._last_saved = (0, time.monotonic())
        self._warned = False
        for partial in saving.folder.glob(f"{PARTIAL}*"):
            partial.unlink(missing_ok=True)
        if not saving.resume:
            self.done()
        elif (saving.folder / INPUTS).exists():
            self._load_inputs()

    def inputs(self) -> RunInputs | None:
        return self._inputs

    def keep_inputs(self, inputs: RunInputs) -> None:
        self._inputs = inputs
        self._save_inputs()

    def finished(self, index: int) -> tuple[Tensor, Mapping[str, object]] | None:
        path = self._latents_path(index)
        if not path.exists() or not self._saving.resume:
            return None
        state, facts = load_state(path, self._device)
        logger.info("prompt %d is done: its latents are in %s", index + 1, path)
        return state["latents"], facts["cost"]

    def begun(self, index: int) -> StepState | None:
        self._index, self._latest = index, None
        self._last_saved = (0, time.monotonic())
        path = self._saving.folder / STEP
        if not self._inputs_saved or not path.exists():
            return None
        state, facts = load_state(path, self._device)
        if facts["key"] != self._key or facts["index"] != index:
            return None
        logger.info("going on after step %d of prompt %d, from %s", facts["step"], index + 1, path)
        self._last_saved = (facts["step"], time.monotonic())
        return StepState(
            step=facts["step"],
            latents=state["latents"],
            parts=part(state, "parts"),
            cost=facts["cost"],
            settings=facts["settings"],
        )

    def step_done(self, state: StepState) -> None:
        self._latest = state
        step, moment = self._last_saved
        if state.step - step >= self._saving.every or time.monotonic() - moment >= 60 * self._saving.minutes:
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
        if self._write(self._latents_path(index).name, {"latents": latents}, facts):
            self._latest = None

    def done(self) -> None:
        self._latest = None
        with suppress(OSError):  # what stays is overwritten or refused by name at the next run
            for name in (STEP, INPUTS):
                (self._saving.folder / name).unlink(missing_ok=True)

    def _latents_path(self, index: int) -> Path:
        return self._saving.folder / LATENTS.format(key=self._key, number=index + 1)

    def _load_inputs(self) -> None:
        path = self._saving.folder / INPUTS
        state, facts = load_state(path, self._device)
        if different := differences(facts["identity"], self._identity):
            raise ValueError(
                f"checkpoint_dir {self._saving.folder} holds an unfinished run that differs in "
                f"{', '.join(different)}; give the same again to go on with it, resume=False to discard it, "
                "or another folder"
            )
        contexts = [Contexts(**part(state, f"context.{i}")) for i in range(facts["prompts"])]
        self._inputs = RunInputs(
            contexts=contexts,
            noise=state["noise"],
            reference=state.get("reference"),
            seconds=facts["seconds"],
        )
        self._inputs_saved = True
        logger.info("going on with the run in %s", self._saving.folder)

    def _save_inputs(self) -> bool:
        inputs = self._inputs
        if not self._inputs_saved and inputs is not None:
            contexts = {f"context.{i}": c._asdict() for i, c in enumerate(inputs.contexts)}
            tensors = {**joined(contexts), "noise": inputs.noise, "reference": inputs.reference}
            tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            facts = {"identity": self._identity, "seed": self._seed, "seconds": dict(inputs.seconds)}
            facts["prompts"] = len(inputs.contexts)
            # A step of a run before this one must never be taken for one of these inputs.
            self._inputs_saved = self._write(INPUTS, tensors, facts)
        return self._inputs_saved

    def _write(self, name: str, state: Mapping[str, object], facts: Mapping[str, object]) -> bool:
        path = self._saving.folder / name
        try:
            save_state(path, state, facts)
        except (OSError, ValueError) as error:
            if not self._warned:
                logger.warning("the run goes on, but %s is not saved: %s", path, error)
            self._warned = True
            return False
        return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, until the context or the process ends.

    Raises ValueError if another run holds it. Systems without file locks are not guarded.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix system
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"checkpoint_dir {folder} is in use by another run") from error
        except OSError as error:
            logger.info("%s is not guarded against a second run: %s", folder, error)
        yield


def clear_checkpoints(folder: str | Path) -> None:
    """Remove all that runs left in a folder, final latents too: for when their videos are written.

    Other files stay. Raises ValueError if a run is using it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    with locked(folder):
        for pattern in (INPUTS, STEP, "latents-*-*.safetensors", f"{PARTIAL}*"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
