"""WanVideoPipeline: from a prompt and a reference video to frames.

Orchestration only: prompts are encoded, the reference is encoded, latents are noised, denoised and decoded;
the maths is in the rooms that this file calls.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffsynth.caches.choose import choose_run_cache
from diffsynth.caches.rules import CacheMaker
from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.configs.defaults import EXACT, RunDefaults, run_defaults, with_preset
from diffsynth.configs.options import RunOptions, check_mode
from diffsynth.data.frames import checked_int
from diffsynth.data.tensors import Video
from diffsynth.models.checkpoint_files import DOWNLOAD_HINT
from diffsynth.models.compile_blocks import compile_blocks
from diffsynth.models.model_manager import ModelManager, check_dtype
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.arguments import (
    given_or,
    negative_prompts,
    prompt_list,
    round_size,
    starting_strength,
    video_length,
    video_size,
)
from diffsynth.pipelines.denoise_run import Hooks, replaced_by
from diffsynth.pipelines.events import Observer, unobserved
from diffsynth.pipelines.generate import generate
from diffsynth.pipelines.guidance import choose_guidance
from diffsynth.pipelines.stages import Frames
from diffsynth.planning.budget import within_budget
from diffsynth.planning.plan import RunPlan, plan_run
from diffsynth.prompters import WanPrompter
from diffsynth.prompters.tokenizer import find_tokenizer
from diffsynth.runs.checkpoint import saving_options
from diffsynth.runs.cost import RunCost
from diffsynth.vram_management import Residency, choose_device

logger = logging.getLogger(__name__)

# What models can compute in; eight bits are for storage.
WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WanVideoPipeline:
    """Text-to-video and video-to-video with Wan2.1. Build it by `from_pretrained` or `from_model_manager`."""

    def __init__(
        self,
        dit: WanModel,
        text_encoder: WanTextEncoder,
        vae: WanVideoVAE,
        prompter: WanPrompter,
        device: str | torch.device = "auto",
        defaults: RunDefaults | None = None,
    ) -> None:
        if dit.has_image_input or dit.in_dim != vae.z_dim:
            raise ValueError(
                f"this pipeline takes a text-to-video DiT of {vae.z_dim} input channels; got one with "
                f"in_dim={dit.in_dim}, has_image_input={dit.has_image_input}"
            )
        if dit.text_dim != text_encoder.dim:
            raise ValueError(
                f"the DiT takes text of width {dit.text_dim}, the text encoder gives {text_encoder.dim}"
            )
        self.dit, self.text_encoder, self.vae, self.prompter = dit, text_encoder, vae, prompter
        self.defaults = RunDefaults() if defaults is None else defaults
        self.device = choose_device(device)
        models = {"dit": dit, "text_encoder": text_encoder, "vae": vae}
        self.residency = Residency(models, self.device)
        self.costs: list[RunCost] = []  # of the last call, one a prompt
        self.options: RunOptions | None = None  # of the last call, as resolved
        self._interrupted = threading.Event()

    @classmethod
    def from_model_manager(
        cls,
        model_manager: ModelManager,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        tokenizer_path: str | Path | None = None,
    ) -> "WanVideoPipeline":
        """A pipeline over the DiT, text encoder and VAE of a manager.

        torch_dtype: what DiT and text encoder compute in (as loaded by default); the VAE stays as loaded.
        device: the manager's by default. tokenizer_path: a folder; by default it is looked for beside the
        text encoder's weights. Raises ValueError if a model is missing or they do not belong together,
        FileNotFoundError without a tokenizer.
        """
        dit, text, vae = (
            model_manager.find(name) for name in ("wan_video_dit", "wan_video_text_encoder", "wan_video_vae")
        )
        tokenizer = find_tokenizer(text.files[0].parent) if tokenizer_path is None else Path(tokenizer_path)
        if torch_dtype is not None:
            check_dtype(torch_dtype, WIDE_DTYPES)
            dit.model.to(torch_dtype)
            text.model.to(torch_dtype)
        prompter = WanPrompter.from_folder(tokenizer, text_len=dit.model.text_len)
        device = model_manager.device if device is None else device
        defaults = run_defaults(dit.files[0].parent)
        return cls(dit.model, text.model, vae.model, prompter, device, defaults)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device = "auto",
        vae_dtype: torch.dtype = torch.float32,
        loras: Mapping[str | Path, float] | None = None,
    ) -> "WanVideoPipeline":
        """A pipeline from a checkpoint folder in the official or diffusers layout, "1.3b" or "14b"
        below models/, or "nano", the small model that comes with the package.

        torch_dtype: bfloat16 on an accelerator and float32 on a CPU by default; float8_e4m3fn and int8 store
        the weights of linear layers in eight bits. The VAE runs in float32, as the official one, unless
        vae_dtype says otherwise. loras: files to merge into the DiT, each with its strength.

        Raises FileNotFoundError for files that are not there, CheckpointError for damaged or other ones.
        """
        folder = checkpoint_folder(path)
        loras = {} if loras is None else loras
        for file in loras:
            if not Path(file).is_file():
                raise FileNotFoundError(f"LoRA {file} does not exist")
        chosen = choose_device(device)
        if torch_dtype is None:
            torch_dtype = torch.float32 if chosen.type == "cpu" else torch.bfloat16
        manager = ModelManager(torch_dtype=torch_dtype)
        manager.load_models([folder], vae_dtype=check_dtype(vae_dtype, WIDE_DTYPES))
        missing = {"wan_video_dit", "wan_video_text_encoder", "wan_video_vae"} - {
            m.name for m in manager.loaded
        }
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks the weights of {', '.join(sorted(missing))}; {DOWNLOAD_HINT}"
            )
        for file, strength in loras.items():
            manager.load_lora(file, strength)
        return cls.from_model_manager(manager, device=chosen)

    def __repr__(self) -> str:
        sizes = f"DiT width {self.dit.dim}, {self.dit.num_layers} blocks, {self.dit.dtype}"
        return f"WanVideoPipeline({sizes}, device={self.device}, offload={self.residency.offload})"

    def enable_cpu_offload(self) -> None:
        """Keep models on the CPU and bring each to the device only for the stage that uses it."""
        self.residency.offload = True
        self.residency.rest()

    def enable_vram_management(
        self, num_persistent_param_in_dit: int | None = None, stream_text_encoder: bool = False
    ) -> None:
        """Save accelerator memory: models rest on the CPU and come stage by stage.

        num_persistent_param_in_dit: None, as in the original, brings the whole DiT while it denoises. A
        number keeps the first blocks of at most so many parameters on the device and streams the others, each
        while the one before it computes; results are the same to the bit. stream_text_encoder: the same for
        the text encoder, with no block kept. Raises ValueError for a number below 0.
        """
        self.enable_cpu_offload()
        self.residency.stop_streaming()
        if num_persistent_param_in_dit is not None:
            kept = checked_int("num_persistent_param_in_dit", num_persistent_param_in_dit, minimum=0)
            self.residency.stream("dit", self.dit.blocks, kept)
        if stream_text_encoder:
            self.residency.stream("text_encoder", self.text_encoder.encoder.block)

    def plan(self, *, vram_gb: float | None = None, **run: Any) -> RunPlan:
        """What a run would take, and the fastest settings that fit into vram_gb; see `plan_run`, whose
        arguments these are. Nothing is changed.
        """
        return plan_run(self, vram_gb=vram_gb, **run)

    def enable_compile(self, backend: str = "inductor") -> None:
        """Compile the DiT's blocks with torch.compile, each size anew when it first comes; the log says how
        long that took. Compiled code may round otherwise. Raises ValueError for an unknown backend.
        """
        compile_blocks(self.dit, backend)

    def interrupt(self) -> None:
        """Ask the running call to stop: it begins no further step and returns what its latents decode to.

        May be called from a callback or from another thread.
        """
        self._interrupted.set()

    def interrupted(self) -> bool:
        """Whether the running call was asked to stop."""
        return self._interrupted.is_set()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        input_video: Video | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        denoising_strength: float | None = None,
        cfg_scale: float | None = None,
        sigma_shift: float | None = None,
        seed: int | None = None,
        rand_device: str = "cpu",
        tiled: bool = True,
        tile_size: tuple[int, int] = (30, 52),
        tile_stride: tuple[int, int] = (15, 26),
        sampler: str | None = None,
        mode: str | None = None,
        sf: int | None = None,
        motion: MotionGuidance | None = None,
        preset: str = EXACT,
        cache: str | CacheMaker | None = None,
        cache_threshold: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        tea_cache_l1_thresh: float | None = None,
        tea_cache_model_id: str = "",
        batch_cfg: bool | None = None,
        vram_budget_gb: float | None = None,
        progress_bar_cmd: Callable[[Iterable], Iterable] = tqdm,
        callback_on_step_end: Callable[["WanVideoPipeline", int, Tensor, dict], dict | None] | None = None,
        observer: Observer = unobserved,
        output_type: str = "pil",
        test_latency: bool = False,
        latency_dir: str | Path | None = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 5,
        checkpoint_minutes: float = 2.0,
        resume: bool = True,
    ) -> Frames | list[Frames]:
        """Generate a video for each prompt.

        input_video: the reference; frames of another size are centre-cropped and resized.
        height, width: pixels, rounded up to a multiple of 16; the reference's by default, else 480 x 832.
        num_frames: any count; the reference's by default, else 81. The reference's first frames are used.
        num_inference_steps, denoising_strength, cfg_scale, sigma_shift: 50, 0.75, 5.8 and 7 by default, as
            published; without a reference a run starts from pure noise. A checkpoint of other sizes may
            declare other defaults, sizes and numbers of motion among them: `pipe.defaults`.
        seed: drawn and logged if None; each prompt of a list starts from the same noise.
        mode: how motion is transferred: "effi_AMF" (tile attention motion flow; the default with a
            reference), "AMF" (dense), "FlowMotion" (latent prediction) or "No_transfer".
        motion: all numbers of the method; sf: its `sf`, the frames that each is compared with.
        vram_budget_gb: memory of the device that the run may use, GB of 2**30 bytes. Models are placed, and
            what guidance keeps is chosen, so that the run fits (see `plan_run`); models stay placed so.
        callback_on_step_end: called with (pipe, step, timestep, {"latents": ...}); latents in a dict that it
            returns replace the run's.
        preset: "exact", or one that trades likeness for time: "balanced", "fast", others that the checkpoint
            declares. It sets defaults; what is given here goes first.
        cache: steps that reuse an earlier one's work: "teacache", "magcache", "first_block", with their
            published numbers and cache_threshold, or `CacheOptions`. tea_cache_l1_thresh: as
            cache="teacache" with that threshold.
        cfg_interval: (from, to), shares of the steps in which the negative prompt runs.
        observer: called with a `RunEvent` when a stage begins and after each of its steps.
        test_latency: append what each run cost, a JSON line, to latency_dir/latency.jsonl; `pipe.costs` has
            it, too.
        checkpoint_dir: folder in which the run is saved every checkpoint_every steps or checkpoint_minutes,
            whatever comes first, when it is interrupted or fails, and before frames are decoded (see
            `decode_saved`). The same call goes on with an unfinished run, to the same bits, and only decodes
            a finished one. An unfinished one that differs in an argument (callbacks aside), the reference or
            the weights is refused; resume=False discards it. SIGINT and SIGTERM raise `RunInterrupted`, a
            KeyboardInterrupt.
        Other arguments: see `RunOptions`.

        Returns one video, or a list of them for a list of prompts: "pil" a list of images; "np" uint8
        [T, H, W, 3]; "pt" float32 [1, 3, T, H, W] in [-1, 1]; "latent" float32 [1, C, F, h, w].
        Raises ValueError or TypeError, naming the argument, before any model runs.
        """
        prompts = prompt_list("prompt", prompt)
        negatives = negative_prompts(negative_prompt, len(prompts))
        check_mode(mode)
        usual = with_preset(self.defaults, preset)
        saving = saving_options(checkpoint_dir, checkpoint_every, checkpoint_minutes, resume)
        height, width = video_size(height, width, usual, input_video)
        total_frames = video_length(num_frames, usual, input_video)
        num_inference_steps = given_or(usual.num_inference_steps, num_inference_steps)
        options = RunOptions(
            height=round_size("height", height, self._pixels_per_token(1)),
            width=round_size("width", width, self._pixels_per_token(2)),
            num_frames=total_frames,
            num_inference_steps=num_inference_steps,
            denoising_strength=starting_strength(denoising_strength, usual, input_video),
            cfg_scale=given_or(usual.cfg_scale, cfg_scale),
            sigma_shift=given_or(usual.sigma_shift, sigma_shift),
            seed=given_or(secrets.randbelow(2**32), saving and saving.seed(), seed),
            rand_device=rand_device,
            tiled=tiled,
            tile_size=tile_size,
            tile_stride=tile_stride,
            sampler=given_or(usual.sampler, sampler),
            motion=choose_guidance(
                mode,
                motion,
                sf,
                None if input_video is None else total_frames,
                num_inference_steps,
                usual.motion,
            ),
            cache=choose_run_cache(
                usual, self.dit.dim, cache, cache_threshold, tea_cache_l1_thresh, tea_cache_model_id
            ),
            cfg_interval=given_or(usual.cfg_interval, cfg_interval),
            batch_cfg=batch_cfg,
            output_type=output_type,
        )
        if options.motion is not None:
            options.motion.block_for(self.dit.num_layers)
        if vram_budget_gb is not None:
            options = within_budget(self, options, vram_budget_gb, with_reference=input_video is not None)
        if test_latency:
            if latency_dir is None:
                raise ValueError("test_latency needs latency_dir, the folder of latency.jsonl")
            Path(latency_dir).mkdir(parents=True, exist_ok=True)
        logger.info("generating %d video(s): %s", len(prompts), options)
        self._interrupted.clear()
        self.options = options
        self.costs = []
        videos = generate(
            self,
            prompts,
            negatives,
            input_video,
            options,
            saving=saving,
            latency_dir=latency_dir if test_latency else None,
            hooks=Hooks(
                progress=progress_bar_cmd,
                on_step_end=replaced_by(callback_on_step_end, self),
                observer=observer,
            ),
        )
        return videos[0] if isinstance(prompt, str) else videos

    def _pixels_per_token(self, axis: int) -> int:
        return self.vae.spatial_factor * self.dit.patch_size[axis]
