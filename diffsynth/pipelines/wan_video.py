"""WanVideoPipeline: from a prompt and a reference video to frames.

Orchestration only: prompts are encoded, the reference is encoded, latents are noised, denoised and decoded;
the maths is in the rooms that this file calls.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffsynth.configs.defaults import RunDefaults, run_defaults
from diffsynth.configs.locate import checkpoint_folder
from diffsynth.models.checkpoint_files import DOWNLOAD_HINT
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
from diffsynth.pipelines.contexts import Contexts, contexts_of, texts_to_encode
from diffsynth.pipelines.denoise import batch_of_two_fits, denoise, guided_velocity, replaced_latents
from diffsynth.pipelines.frames import Video, chunks_to_uint8, video_to_tensor
from diffsynth.pipelines.guidance import choose_guidance, make_guide
from diffsynth.pipelines.latency import RunCost, measured
from diffsynth.pipelines.options import GenerationOptions, check_mode
from diffsynth.pipelines.tea_cache import TeaCache, tea_cache_model_id
from diffsynth.prompters import WanPrompter
from diffsynth.prompters.tokenizer import find_tokenizer
from diffsynth.schedulers import make_scheduler
from diffsynth.vram_management import Residency, choose_device

logger = logging.getLogger(__name__)

# What models can compute in; float8 is for storage.
WIDE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Frames = list[Image.Image] | np.ndarray | Tensor


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
    ) -> "WanVideoPipeline":
        """A pipeline from a checkpoint folder in the official or diffusers layout, "1.3b" or "14b"
        below models/, or "nano", the small model that comes with the package.

        torch_dtype: bfloat16 on an accelerator and float32 on a CPU by default; float8_e4m3fn stores weights
        in float8. The VAE runs in float32, as the official one, unless vae_dtype says otherwise.
        """
        folder = checkpoint_folder(path)
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
        return cls.from_model_manager(manager, device=chosen)

    def __repr__(self) -> str:
        sizes = f"DiT width {self.dit.dim}, {self.dit.num_layers} blocks, {self.dit.dtype}"
        return f"WanVideoPipeline({sizes}, device={self.device}, offload={self.residency.offload})"

    def enable_cpu_offload(self) -> None:
        """Keep models on the CPU and bring each to the device only for the stage that uses it."""
        self.residency.offload = True
        self.residency.rest()

    def enable_vram_management(self, num_persistent_param_in_dit: int | None = None) -> None:
        """Save accelerator memory: models rest on the CPU and come stage by stage, the DiT as a whole.

        num_persistent_param_in_dit: None, as in the original, keeps the whole DiT on the device while it
        denoises. A number is accepted but keeps the whole DiT there too, and a warning says so.
        """
        if num_persistent_param_in_dit is not None:
            logger.warning(
                "num_persistent_param_in_dit=%s has no effect: the DiT comes whole",
                num_persistent_param_in_dit,
            )
        self.enable_cpu_offload()

    def interrupt(self) -> None:
        """Ask the running call to stop: it begins no further step and returns what its latents decode to.

        May be called from a callback or from another thread.
        """
        self._interrupted.set()

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
        sampler: str = "euler",
        mode: str | None = None,
        sf: int | None = None,
        motion: MotionGuidance | None = None,
        tea_cache_l1_thresh: float | None = None,
        tea_cache_model_id: str = "",
        batch_cfg: bool | None = None,
        progress_bar_cmd: Callable[[Iterable], Iterable] = tqdm,
        callback_on_step_end: Callable[["WanVideoPipeline", int, Tensor, dict], dict | None] | None = None,
        output_type: str = "pil",
        test_latency: bool = False,
        latency_dir: str | Path | None = None,
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
        callback_on_step_end: called with (pipe, step, timestep, {"latents": ...}); latents in a dict that it
            returns replace the run's.
        test_latency: append what each run cost, a JSON line, to latency_dir/latency.jsonl.
        Other arguments: see `GenerationOptions`.

        Returns one video, or a list of them for a list of prompts: "pil" a list of images; "np" uint8
        [T, H, W, 3]; "pt" float32 [1, 3, T, H, W] in [-1, 1]; "latent" float32 [1, C, F, h, w].
        Raises ValueError or TypeError, naming the argument, before any model runs.
        """
        prompts = prompt_list("prompt", prompt)
        negatives = negative_prompts(negative_prompt, len(prompts))
        check_mode(mode)
        usual = self.defaults
        height, width = video_size(height, width, usual, input_video)
        total_frames = video_length(num_frames, usual, input_video)
        num_inference_steps = given_or(usual.num_inference_steps, num_inference_steps)
        options = GenerationOptions(
            height=round_size("height", height, self._pixels_per_token(1)),
            width=round_size("width", width, self._pixels_per_token(2)),
            num_frames=total_frames,
            num_inference_steps=num_inference_steps,
            denoising_strength=starting_strength(denoising_strength, usual, input_video),
            cfg_scale=given_or(usual.cfg_scale, cfg_scale),
            sigma_shift=given_or(usual.sigma_shift, sigma_shift),
            seed=secrets.randbelow(2**32) if seed is None else seed,
            rand_device=rand_device,
            tiled=tiled,
            tile_size=tile_size,
            tile_stride=tile_stride,
            sampler=sampler,
            motion=choose_guidance(
                mode,
                motion,
                sf,
                None if input_video is None else total_frames,
                num_inference_steps,
                usual.motion,
            ),
            tea_cache_l1_thresh=tea_cache_l1_thresh,
            tea_cache_model_id=tea_cache_model_id,
            batch_cfg=batch_cfg,
            output_type=output_type,
        )
        self._make_tea_cache(options)
        if options.motion is not None:
            options.motion.block_for(self.dit.num_layers)
        if test_latency:
            if latency_dir is None:
                raise ValueError("test_latency needs latency_dir, the folder of latency.jsonl")
            Path(latency_dir).mkdir(parents=True, exist_ok=True)
        logger.info("generating %d video(s): %s", len(prompts), options)
        self._interrupted.clear()
        contexts = self._encode_prompts(prompts, negatives, options)
        reference = None if input_video is None else self._encode_video(input_video, options)
        videos = []
        for context in contexts:
            latents, cost = self._denoise(context, reference, options, progress_bar_cmd, callback_on_step_end)
            if test_latency:
                cost.append_to(latency_dir)
            videos.append(self._decode(latents, options))
            if self._interrupted.is_set():
                break
        return videos[0] if isinstance(prompt, str) else videos

    def _pixels_per_token(self, axis: int) -> int:
        return self.vae.spatial_factor * self.dit.patch_size[axis]

    def _make_tea_cache(self, options: GenerationOptions) -> TeaCache | None:
        if options.tea_cache_l1_thresh is None:
            return None
        model_id = options.tea_cache_model_id or tea_cache_model_id(self.dit.dim)
        return TeaCache(options.num_inference_steps, options.tea_cache_l1_thresh, model_id)

    def _encode_prompts(
        self, prompts: list[str], negatives: list[str], options: GenerationOptions
    ) -> list[Contexts]:
        """The text embeddings of each prompt's run, on the device; only those that the run reads."""
        texts = texts_to_encode(prompts, negatives, options.cfg_scale != 1, options.motion is not None)
        flat = [text for group in texts.values() for text in group]
        if self.prompter.cached(flat, self.text_encoder):
            rows = self.prompter.encode_prompt(flat, self.text_encoder)
        else:
            with self.residency.using("text_encoder"):
                rows = self.prompter.encode_prompt(flat, self.text_encoder)
        return contexts_of(texts, rows.to(self.device))

    def _tiling(self, options: GenerationOptions) -> dict:
        return {"tiled": options.tiled, "tile_size": options.tile_size, "tile_stride": options.tile_stride}

    def _encode_video(self, video: Video, options: GenerationOptions) -> Tensor:
        """The reference as latents [1, C, F, h, w]."""
        pixels = video_to_tensor(video, options.num_frames, options.height, options.width)
        with self.residency.using("vae"):
            return self.vae.encode(pixels, **self._tiling(options))

    def _denoise(
        self,
        context: Contexts,
        reference: Tensor | None,
        options: GenerationOptions,
        progress: Callable[[Iterable], Iterable],
        callback: Callable | None,
    ) -> tuple[Tensor, RunCost]:
        """From noise, or the noised reference, to clean latents [1, C, F, h, w], and what it cost."""
        scheduler = make_scheduler(options.sampler, options.sigma_shift)
        scheduler.set_timesteps(options.num_inference_steps, options.denoising_strength)
        noise = self._noise(options)
        start = noise if reference is None else scheduler.add_noise(reference, noise, scheduler.timesteps[0])
        cost = RunCost(options.seed, options.mode, options.num_inference_steps)

        def on_step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
            returned = None if callback is None else callback(self, step, timestep, {"latents": latents})
            return latents if returned is None else replaced_latents(returned, latents)

        guide = None
        if options.motion is not None:
            guide = make_guide(
                self.dit,
                options.motion,
                scheduler,
                start=start,
                reference=reference,
                noise=noise,
                context=context.positive,
                null_context=context.null,
                cost=cost,
                interrupted=self._interrupted.is_set,
            )
        with self.residency.using("dit"), measured(cost, self.dit, self.device):
            batch = options.batch_cfg
            if batch is None:
                batch = batch_of_two_fits(self.dit, self._num_tokens(start), self.device)
            velocity = guided_velocity(
                self.dit,
                context.positive,
                context.negative,
                options.cfg_scale,
                batch=batch,
                make_cache=lambda: self._make_tea_cache(options),
            )
            latents = denoise(
                start,
                scheduler,
                velocity,
                guide=guide,
                progress=progress,
                on_step_end=on_step_end,
                interrupted=self._interrupted.is_set,
            )
        return latents, cost

    def _num_tokens(self, latents: Tensor) -> int:
        frames, rows, cols = (n // p for n, p in zip(latents.shape[2:], self.dit.patch_size, strict=True))
        return frames * rows * cols

    def _noise(self, options: GenerationOptions) -> Tensor:
        """Float32 noise [1, C, F, h, w] from the seed, drawn on rand_device: devices can start alike."""
        frames = -(-(options.num_frames - 1) // self.vae.temporal_factor) + 1
        shape = (
            1,
            self.dit.in_dim,
            frames,
            *(n // self.vae.spatial_factor for n in (options.height, options.width)),
        )
        return torch.randn(shape, generator=options.generator(), device=options.rand_device).to(self.device)

    def _decode(self, latents: Tensor, options: GenerationOptions) -> Frames:
        if not latents.isfinite().all():
            raise RuntimeError(
                f"denoising gave values that are not finite (DiT in {self.dit.dtype}); no video is made"
            )
        if options.output_type == "latent":
            return latents
        with self.residency.using("vae"):
            if options.output_type == "pt":
                return self.vae.decode(latents, num_frames=options.num_frames, **self._tiling(options))
            if options.tiled:
                video = self.vae.decode(latents, num_frames=options.num_frames, **self._tiling(options))
                chunks: Iterable[Tensor] = video.split(self.vae.temporal_factor, dim=2)
            else:
                chunks = self.vae.decode_chunks(latents)
            frames = chunks_to_uint8(chunks, options.num_frames)
        return frames if options.output_type == "np" else [Image.fromarray(frame) for frame in frames]
