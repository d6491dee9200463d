"""WanVideoPipeline: from a prompt and a reference video to frames."""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm  # a widget in notebooks

from diffsynth.configs.defaults import RunDefaults, run_defaults
from diffsynth.configs.options import SavingOptions
from diffsynth.configs.resolve import NEW_SEED, resolve, resolve_prompts, unknown_words
from diffsynth.data import VideoData, files
from diffsynth.data.frames import Picture, checked_int
from diffsynth.data.tensors import Video
from diffsynth.models.compile_blocks import compile_blocks
from diffsynth.models.model_manager import ModelManager, check_dtype
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines import components
from diffsynth.pipelines.decode import Frames
from diffsynth.pipelines.generate import GeneratedVideo, Observer, generate, watchers
from diffsynth.planning.ladder import Ladder
from diffsynth.planning.plan import RunPlan, plan_run, resolve_plan
from diffsynth.planning.reference import reference_pixels
from diffsynth.planning.sizes import ModelSizes
from diffsynth.prompters import WanPrompter
from diffsynth.runs.checkpoint import open_run, saved_seed
from diffsynth.runs.cost import RunCost, latency_file
from diffsynth.schedulers import FlowMatchScheduler, make_scheduler
from diffsynth.vram_management import Residency, choose_device

if TYPE_CHECKING:
    from diffsynth.configs.call_types import CallArguments, CallOptions, Unpack

logger = logging.getLogger(__name__)

Callback = Callable[["WanVideoPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class WanVideoPipeline:
    """Motion transfer with Wan: a video that moves as a reference does and shows what a prompt says.

    Build it by `from_pretrained` or `from_model_manager`, then call it; without a reference, texts suffice:

        pipe = WanVideoPipeline.from_pretrained("1.3b")
        frames = pipe("a red fox in fresh snow", input_video=VideoData("ref.mp4"))
        save_video(frames, "fox.mp4")

    Attributes:
        models: the models (see `Components`), the prompter and their devices.
        defaults: the checkpoint's defaults for arguments that a call leaves out.
    """

    def __init__(
        self,
        dit: WanModel,
        text_encoder: WanTextEncoder,
        vae: WanVideoVAE,
        prompter: WanPrompter,
        device: str | torch.device = "auto",
        defaults: RunDefaults | None = None,
        **more: Any,
    ) -> None:
        models = {"dit": dit, "text_encoder": text_encoder, "vae": vae, **more}
        residency = Residency(models, choose_device(device))
        residency.offload = "low_noise_dit" in more  # one expert at a time
        self.models = components.Components(**models, prompter=prompter, residency=residency)
        self.defaults = RunDefaults() if defaults is None else defaults
        self._manager: ModelManager | None = None
        self._begun: list[threading.Event] = []  # what stops each call that has begun and not ended
        self._running = threading.Event()  # of the call whose turn it is or was last
        self._videos: list[GeneratedVideo] = []

    @classmethod
    def from_model_manager(
        cls,
        model_manager: ModelManager,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        tokenizer_path: str | Path | None = None,
        use_usp: bool = False,
    ) -> "WanVideoPipeline":
        """Return a pipeline over the models of a manager.

        Args:
            model_manager: what has loaded the models.
            torch_dtype: dtype of all models but the VAE; by default as loaded.
            device: by default the manager's.
            tokenizer_path: folder of the tokenizer; by default the text encoder's.
            use_usp: DiffSynth's switch for several GPUs; only False.

        Raises:
            ValueError: a model is missing, the models do not belong together, or use_usp is True.
            FileNotFoundError: no tokenizer is found.
        """
        if use_usp:
            raise ValueError("use_usp=True is not supported: one pipeline computes on one device")
        found = components.models_of(model_manager)
        models: Any = {name: entry.model for name, entry in found.items()}
        tokenizer = components.tokenizer_of(found["text_encoder"], tokenizer_path)
        models["prompter"] = WanPrompter(tokenizer, models["dit"].text_len)
        models["device"] = model_manager.device if device is None else device
        pipe = cls(**models, defaults=run_defaults(found["dit"].files[0].parent, models["dit"]))
        pipe._manager = model_manager
        return pipe.to(torch_dtype=torch_dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device = "auto",
        vae_dtype: torch.dtype = torch.float32,
        loras: Mapping[str, float] | Mapping[Path, float] | None = None,
        **parts: str | Path,
    ) -> "WanVideoPipeline":
        """Return a pipeline over a checkpoint.

        Args:
            path: a folder in the official or diffusers layout, "1.3b", "14b", or "nano", the embedded model.
            torch_dtype: by default the declared one, or as `choose_dtype` says; float8_e4m3fn, int8: 8 bits.
            device: "auto", "cpu", "cuda", "cuda:1", ...
            vae_dtype: dtype of the VAE.
            loras: LoRA file -> strength; the files are merged into the DiT.
            parts: dit, text_encoder, vae, ...: weights that are loaded instead of the checkpoint's.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: a file is damaged or of another kind.
        """
        chosen = choose_device(device)
        vae_dtype = check_dtype(vae_dtype, components.WIDE_DTYPES)
        manager = components.load_checkpoint(path, chosen, torch_dtype, vae_dtype, loras or {}, parts)
        return cls.from_model_manager(manager, device=chosen)

    @property
    def dit(self) -> WanModel:
        return self.models.dit

    @property
    def text_encoder(self) -> WanTextEncoder:
        return self.models.text_encoder

    @property
    def vae(self) -> WanVideoVAE:
        return self.models.vae

    @property
    def prompter(self) -> WanPrompter:
        return self.models.prompter

    @property
    def residency(self) -> Residency:
        return self.models.residency

    @property
    def device(self) -> torch.device:
        return self.models.device

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype that the DiT computes in."""
        return self.dit.dtype

    @property
    def scheduler(self) -> FlowMatchScheduler:
        """A new scheduler with the defaults of the checkpoint."""
        return make_scheduler(self.defaults["sampler"], self.defaults["sigma_shift"])

    def to(
        self, device: str | torch.device | torch.dtype | None = None, torch_dtype: torch.dtype | None = None
    ) -> "WanVideoPipeline":
        """Compute on another device or, but for the VAE, in another dtype, which may come alone; return self.

        Raises:
            ValueError: the dtype is not float32, bfloat16, float16 or float64.
        """
        self.models = self.models.to(device, torch_dtype)
        return self

    def load_lora(self, module: WanModel, path: str | Path, alpha: float = 1.0) -> None:
        """Add a LoRA file to the DiT, as DiffSynth's call does; see `ModelManager.load_lora`.

        Args:
            module: pipe.dit or, of two experts, pipe.models.low_noise_dit.
            path: path of the file.
            alpha: strength of the LoRA.

        Raises:
            ValueError: module is not a DiT of the pipeline, or no `ModelManager` loaded the pipeline.
        """
        names = [name for name in self.models.experts if getattr(self.models, name) is module]
        if not names or self._manager is None:
            raise ValueError("load_lora takes pipe.dit of a pipeline that a ModelManager has loaded")
        which = {"dit": "high", "low_noise_dit": "low"}[names[0]]
        self._manager.load_lora(path, alpha, expert=which if len(self.models.experts) == 2 else None)

    def clear_lora(self) -> None:
        """Remove all LoRAs from the DiT; its weights are then bit-identical to those without them."""
        if self._manager is not None:
            self._manager.unload_lora()

    def __repr__(self) -> str:
        sizes = f"DiT width {self.dit.dim}, {self.dit.num_layers} blocks, {self.dit.dtype}"
        return f"WanVideoPipeline({sizes}, device={self.device}, offload={self.residency.offload})"

    def enable_cpu_offload(self) -> None:
        """Keep models on the CPU and bring each to the device only for the stage that uses it."""
        self.residency.offload = self.residency.settled = True
        self.residency.rest()

    def enable_vram_management(
        self, num_persistent_param_in_dit: int | None = None, stream_text_encoder: bool = False
    ) -> None:
        """Save accelerator memory: models rest on the CPU and come stage by stage. Results are the same.

        Args:
            num_persistent_param_in_dit: None brings the whole DiT while it denoises. A number keeps the first
                blocks of at most so many parameters on the device and streams the others.
            stream_text_encoder: streams the blocks of the text encoder.

        Raises:
            ValueError: a number below 0.
        """
        self.enable_cpu_offload()
        self.residency.stop_streaming()
        if num_persistent_param_in_dit is not None:
            kept = checked_int("num_persistent_param_in_dit", num_persistent_param_in_dit, minimum=0)
            for name in self.models.experts:
                self.residency.stream(name, getattr(self.models, name).blocks, kept)
        if stream_text_encoder:
            self.residency.stream("text_encoder", self.text_encoder.encoder.block)

    def plan(self, *, vram_gb: float | None = None, **options: "Unpack[CallOptions]") -> RunPlan:
        """Return the fastest settings that fit into memory, with the cost of the run; change nothing.

        Args:
            vram_gb: memory of the device that may be used, in GB of 2**30 bytes; None for no limit.
            options: as in the call; the reference is assumed to have the output's size and length.

        Raises:
            NotEnoughMemoryError: no settings fit.
        """
        run = resolve_plan(options, self.defaults, self.models.facts())
        sizes = ModelSizes.of(self.residency.models)
        return plan_run(sizes, run, vram_gb=vram_gb, with_reference=run.motion is not None)

    def enable_compile(self, backend: str = "inductor") -> None:
        """Compile the DiT's blocks with torch.compile, once for each size. Compiled code may round otherwise.

        Raises:
            ValueError: the backend is unknown.
        """
        for name in self.models.experts:
            compile_blocks(getattr(self.models, name), backend)

    def interrupt(self) -> None:
        """Stop the running call before its next step, from any thread, and let it decode; see also `stop`."""
        self._stop().set()

    def interrupted(self) -> bool:
        """Return whether the running call was asked to stop."""
        return self._stop().is_set()

    def _stop(self) -> threading.Event:
        """Return what stops the running call or, while none has its turn, the first that waits for it."""
        return next((one for one in (self._running, *self._begun) if one in self._begun), threading.Event())

    @property
    def costs(self) -> list[RunCost]:
        """Return the costs of the videos of the last finished call, in their order."""
        return [video.cost for video in self._videos]

    # fmt: off
    @overload
    def __call__(self, prompt: str, negative_prompt: str | None = ..., input_video: Video | None = ..., *,
                 output_type: Literal["pil"] = ..., **more: "Unpack[CallArguments]") -> list[Image.Image]: ...
    @overload
    def __call__(self, prompt: str, negative_prompt: str | None = ..., input_video: Video | None = ..., *,
                 output_type: Literal["np"], **more: "Unpack[CallArguments]") -> np.ndarray: ...
    @overload
    def __call__(self, prompt: str, negative_prompt: str | None = ..., input_video: Video | None = ..., *,
                 output_type: Literal["pt", "latent"], **more: "Unpack[CallArguments]") -> Tensor: ...
    @overload
    def __call__(self, prompt: str, negative_prompt: str | None = ..., input_video: Video | None = ..., *,
                 output_type: str, **more: "Unpack[CallArguments]") -> Frames: ...
    @overload
    def __call__(self, prompt: list[str] | tuple[str, ...], negative_prompt: str | Sequence[str] | None = ...,
                 input_video: Video | None = ..., *, output_type: str = ...,
                 **more: "Unpack[CallArguments]") -> list[Any]: ...
    # fmt: on

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        input_video: Video | None = None,
        **arguments: Any,
    ) -> Frames | list[Frames]:
        """Generate a video for each prompt; with input_video it moves as that reference does.

        Args:
            prompt: what the video should show; several for several videos from the same noise.
            negative_prompt: what it should not show; the checkpoint's by default.
            input_video: the reference; its first num_frames frames, centre-cropped and resized.
            input_image: the picture that the video begins with, likewise fitted; end_image: ends with.
            progress_bar_cmd: wraps the denoising steps, as tqdm does; set_postfix_str is told what is done.
            callback_on_step_end: called with (pipe, step, timestep, {"latents": ...}); may return new ones.
            observer: called with a `RunEvent` when a stage begins and after each of its steps.
            test_latency, latency_dir: append what each video cost, a JSON line, to latency_dir/latency.jsonl.
            checkpoint_dir: folder in which the run is saved regularly, when it stops or fails, and before
                decoding. The same call continues it with the same results. Signals raise `RunInterrupted`.
            checkpoint_every, checkpoint_minutes: steps, and minutes, from save to save; what comes first.
            resume: continue an unfinished run; False discards it.
            stop: once this event is set, from any thread, the call ends as after `interrupt`.
            arguments: options, stated by `RunOptions` and `Shorthands`, listed in docs/api.md; by default the
                preset's, else the checkpoint's (`defaults`), the reference's, the published method's.

        Returns:
            One video, or a list of them for a list of prompts, by output_type: "pil" a list of images; "np"
            uint8 [T, H, W, 3]; "pt" float32 [1, 3, T, H, W] in [-1, 1]; "latent" float32 [1, C, F, h, w].

        Raises:
            ValueError, TypeError: before any model runs: an argument is not allowed, or not the saved run's.

        Example:
            frames = pipe("a red fox", input_video=VideoData("ref.mp4"), mode="AMF", seed=0)
        """
        self._videos = self.run(prompt, negative_prompt, input_video, **arguments)
        return self._videos[0].frames if isinstance(prompt, str) else [made.frames for made in self._videos]

    def run(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        input_video: Video | None = None,
        *,
        input_image: Picture | None = None,
        end_image: Picture | None = None,
        progress_bar_cmd: Callable[[Iterable[int]], Iterable[int]] | None = tqdm,
        callback_on_step_end: Callback | None = None,
        observer: Observer | None = None,
        test_latency: bool = False,
        latency_dir: str | Path | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 5,
        checkpoint_minutes: float = 2.0,
        resume: bool = True,
        stop: threading.Event | None = None,
        **options: "Unpack[CallOptions]",
    ) -> list[GeneratedVideo]:
        """Generate a video for each prompt, as the call does, and return what each was made by as well."""
        bar, observer, on_step, stop = watchers(self, progress_bar_cmd, observer, callback_on_step_end, stop)
        self._begun.append(stop)
        try:
            prompts = resolve_prompts(prompt, negative_prompt, self.defaults)
            if ignored := unknown_words([text for text, _ in prompts], self.defaults.words):
                logger.warning("%s", ignored)
            costs = latency_file(latency_dir) if test_latency else None
            saving = SavingOptions(
                checkpoint_every=checkpoint_every, checkpoint_minutes=checkpoint_minutes, resume=resume
            )
            folder = None
            if checkpoint_dir is not None:
                folder = files.writable_folder("checkpoint_dir", checkpoint_dir)
                if resume and options.get("seed") in (None, NEW_SEED):
                    options["seed"] = saved_seed(folder)
            facts = components.reference_facts(input_video), self.models.facts()
            run = resolve(options, self.defaults, *facts)
            pictures = self.models.read_pictures(input_image, end_image)
            with self.residency.exclusive(run.deterministic):
                self._running = stop
                pixels, run = reference_pixels(input_video, pictures, run)
                ladder = Ladder(self.residency, self.vae)
                run = ladder.begin(run, options.get("vram_budget_gb"), with_reference=input_video is not None)
                logger.info("generating %d video(s): %s", len(prompts), run)
                frames = pixels, pictures
                with open_run(folder, saving, self.residency, prompts, *frames, run, stop.set) as saved:
                    videos = generate(
                        *(self.models, prompts, *frames, run, ladder, self.defaults["reads_db"]),
                        on_step=on_step,
                        observer=observer,
                        progress=bar,
                        stop=stop.is_set,
                        saved=saved,
                        fps=input_video.fps if isinstance(input_video, VideoData) else None,
                    )
        finally:
            self._begun.remove(stop)
        if costs is not None:
            for video in videos:
                video.cost.append_to(costs)
        return videos
