"""Whole runs of image models and of Wan2.2 against golden trajectories of the official code."""

import json
import shutil
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth import ModelManager, MotionGuidance, WanVideoPipeline
from diffsynth.configs.defaults import run_defaults
from diffsynth.configs.fields import check_value, options_of
from diffsynth.configs.options import RunOptions
from diffsynth.models.checkpoint_files import CheckpointError
from diffsynth.models.model_kinds import expert_of
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_keys import diffusers_module, dit_config_from_shapes
from diffsynth.models.wan_video_image_encoder import WanImageEncoder
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.models.wan_video_vae22 import WanVideoVAE22
from diffsynth.motion import guided_step
from diffsynth.pipelines import denoise, generate, image_condition
from diffsynth.testing import write_checkpoint
from diffsynth.vram_management import residency

CLOSE = {"atol": 2e-5, "rtol": 0}


def dit_of(tensors, info, prefix="sd."):
    weights = {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    dit = WanModel(**dit_config_from_shapes(shapes, info["config"])).eval().requires_grad_(False)
    dit.load_state_dict(weights)
    return dit


class Texts:
    """A prompter that knows the golden embeddings of two texts."""

    def __init__(self, g):
        self.known = {"a prompt": g["context"], "its opposite": g["negative_context"]}

    def cached(self, _texts, _encoder):
        return True

    def encode_prompt(self, texts, _encoder):
        length = max(self.known[text].shape[1] for text in texts)
        padded = [
            torch.nn.functional.pad(t, (0, 0, 0, length - t.shape[1])) for t in map(self.known.get, texts)
        ]
        return torch.cat(padded)


@pytest.fixture
def run(golden, monkeypatch):
    """A function: golden run, solver, pictures, options -> final latents, which are the golden ones."""

    def make(name, sampler, pictures=(), key=None, **options):
        g, info = golden(name)
        weights = info["weights"]
        text = WanTextEncoder(
            vocab=8, dim=40, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=1, num_buckets=4
        )
        more = {}
        if "sd_high.head.modulation" in g:
            dit = dit_of(g, info, "sd_high.")
            more["low_noise_dit"] = dit_of(g, info, "sd_low.")
        else:
            dit = dit_of(*golden(weights["dit"]))
        vae_name = weights.get("vae", "vae_tiny_weights")
        vae = WanVideoVAE22(**golden(vae_name)[1]["kwargs"]) if "22" in vae_name else WanVideoVAE(dim=4)
        vae.load_state_dict(golden(vae_name)[0])
        if "clip" in weights:
            clip, clip_info = golden(weights["clip"])
            more["image_encoder"] = WanImageEncoder(**clip_info["kwargs"]).requires_grad_(False)
            more["image_encoder"].load_state_dict({k[3:]: v for k, v in clip.items() if k[:3] == "sd."})
        pipe = WanVideoPipeline(dit, text, vae.requires_grad_(False), Texts(g), "cpu", **more)
        # Golden pictures are no whole numbers: pictures of another brightness stand for them.
        stand_ins = {name: Image.new("L", (64, 48), i) for i, name in enumerate(pictures)}
        tensors = {(i, i, i): g[name] for i, name in enumerate(pictures)}
        monkeypatch.setattr(image_condition, "picture_to_tensor", lambda p, *_: tensors[p.getpixel((0, 0))])
        monkeypatch.setattr(generate, "draw_noise", lambda *_: g["noise"])
        numbers = info.get("run", info["kwargs"])
        seen = [g["noise"]]
        result = pipe(
            "a prompt",
            "its opposite",
            **dict(zip(("input_image", "end_image"), stand_ins.values(), strict=False)),
            **{name: numbers[name] for name in ("num_frames", "height", "width")},
            num_inference_steps=numbers["steps"],
            sigma_shift=numbers["shift"],
            sampler=sampler,
            tiled=False,
            output_type="latent",
            progress_bar_cmd=None,
            callback_on_step_end=lambda _pipe, _step, _t, kwargs: seen.append(kwargs["latents"]),
            **{"cfg_scale": numbers.get("cfg_scale"), **options},
        )
        expected = g[f"{key + '.' if key else ''}{sampler}.trajectory"]
        torch.testing.assert_close(torch.cat(seen[1:]), expected[1:], **CLOSE)
        torch.testing.assert_close(result[0], expected[-1], **CLOSE)
        return result

    return make


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_image_to_video_of_wan21_is_the_official_one(run, sampler):
    run("pipe_i2v21_tiny", sampler, ["image"])


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_first_and_last_frame_to_video_is_the_official_one(run, sampler):
    run("pipe_flf2v_tiny", sampler, ["image", "last_image"])


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_ti2v_with_and_without_a_picture_is_the_official_one(run, sampler, golden):
    result = run("pipe_ti2v_tiny", sampler, ["image"], key="i2v")
    first = golden("pipe_ti2v_tiny")[0]["first_frame_latents"]
    torch.testing.assert_close(result[:, :, :1], first, **CLOSE)
    run("pipe_ti2v_tiny", sampler, key="t2v")


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_two_experts_of_texts_are_the_official_ones(run, sampler):
    scales = {"cfg_scale": 4.0, "low_noise_cfg_scale": 3.0}
    run("pipe_a14b_t2v_tiny", sampler, **scales)
    with pytest.raises(AssertionError):
        run("pipe_a14b_t2v_tiny", sampler, **scales, boundary=0.0)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("batch_cfg", [False, True])
def test_two_experts_of_pictures_are_the_official_ones(run, sampler, batch_cfg):
    scales = {"cfg_scale": 4.0, "low_noise_cfg_scale": 2.5}
    run("pipe_a14b_i2v_tiny", sampler, ["image"], **scales, batch_cfg=batch_cfg)


SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 1}
SMALL |= {"progress_bar_cmd": None, "output_type": "latent", "sigma_shift": 5.0}
PICTURE = Image.linear_gradient("L").resize((40, 50))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function: size -> a checkpoint of that size in the official layout."""
    return cache(lambda size: write_checkpoint(tmp_path_factory.mktemp("family") / size, size=size))


@pytest.mark.parametrize("size", ["tiny-i2v", "tiny-flf2v", "tiny-ti2v", "tiny-a14b", "tiny-a14b-i2v"])
def test_official_folders_load_and_take_the_pictures_of_their_kind(checkpoint, size):
    pipe = WanVideoPipeline.from_pretrained(checkpoint(size), device="cpu")
    takes = {"tiny-i2v": ["input_image"], "tiny-flf2v": ["input_image", "end_image"], "tiny-a14b": []}
    given = dict.fromkeys(takes.get(size, ["input_image"]), PICTURE)
    latents = pipe("a cat", **given, **SMALL)
    assert latents.shape == ((1, 48, 2, 2, 2) if size == "tiny-ti2v" else (1, 16, 2, 4, 4))
    assert latents.isfinite().all()
    if given:
        other = {name: PICTURE.transpose(Image.Transpose.ROTATE_180) for name in given}
        assert not torch.equal(pipe("a cat", **other, **SMALL), latents)
    if size not in ("tiny-ti2v", "tiny-a14b"):
        with pytest.raises(ValueError, match="needs input_image; none is given"):
            pipe("a cat", **SMALL)
    if "end_image" not in given and size != "tiny-a14b-i2v":
        with pytest.raises(ValueError, match="this model takes no end_image"):
            pipe("a cat", **{**given, "end_image": PICTURE}, **SMALL)


def test_a_text_model_takes_no_picture(tiny_checkpoint):
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(ValueError, match="this model takes no input_image"):
        pipe("a cat", input_image=PICTURE, **SMALL)


def test_bad_pictures_are_told_before_any_model_runs(checkpoint, tmp_path, monkeypatch):
    pipe = WanVideoPipeline.from_pretrained(checkpoint("tiny-ti2v"), device="cpu")
    animated = tmp_path / "two.gif"
    Image.new("L", (40, 40)).save(animated, save_all=True, append_images=[Image.new("L", (40, 40), 200)])
    with monkeypatch.context() as patch:
        for model in pipe.residency.models.values():
            patch.setattr(model, "forward", None)
        with pytest.raises(ValueError, match=r"input_image must have 8 pixels a side .*; got 1x1"):
            pipe("a cat", input_image=Image.new("RGB", (1, 1)), **SMALL)
        with pytest.raises(ValueError, match=r"input_image must have .* in all; got 20000x20000"):
            pipe("a cat", input_image=Image.new("1", (20000, 20000)), **SMALL)
        for picture in (animated, Image.open(animated)):
            with pytest.raises(ValueError, match="input_image must be one picture; it is animated, 2 frames"):
                pipe("a cat", input_image=picture, **SMALL)
    for array, size in ((np.zeros((1, 1, 3), np.uint8), "1x1"), (np.zeros((0, 9, 3), np.uint8), "9x0")):
        with pytest.raises(ValueError, match=rf"input_image must have 8 pixels a side .* got {size}"):
            pipe("a cat", input_image=array, **SMALL)
    # What is transparent is black, as in videos.
    clear, black = Image.new("RGBA", (40, 40), (255, 0, 0, 0)), Image.new("RGB", (40, 40))
    assert torch.equal(pipe("a cat", input_image=clear, **SMALL), pipe("a cat", input_image=black, **SMALL))


def test_experts_and_vaes_of_other_models_are_refused(checkpoint):
    folder = checkpoint("tiny-a14b")
    parts = {"vae": next(checkpoint("tiny-ti2v").glob("*VAE*"))}
    with pytest.raises(ValueError, match="which are not those of a VAE with 48 channels"):
        WanVideoPipeline.from_pretrained(folder, device="cpu", **parts)


def test_equal_experts_give_the_bits_of_one(checkpoint, tmp_path):
    pair = tmp_path / "pair"
    shutil.copytree(checkpoint("tiny-a14b"), pair)
    shutil.rmtree(pair / "low_noise_model")
    shutil.copytree(pair / "high_noise_model", pair / "low_noise_model")
    both = WanVideoPipeline.from_pretrained(pair, device="cpu")
    assert both.models.low_noise_dit is not both.dit
    one = WanVideoPipeline(both.dit, both.text_encoder, both.vae, both.prompter, "cpu")
    for sampler in ("euler", "unipc"):
        assert torch.equal(both("a cat", sampler=sampler, **SMALL), one("a cat", sampler=sampler, **SMALL))
    clip = [PICTURE.rotate(turn).convert("RGB") for turn in range(5)]
    motion = {"guided_steps": 3, "inner_steps": 2, "block": 1, "window": 1, "tile": (1, 1), "sf": 2}
    arguments = {**SMALL, "input_video": clip, "motion": motion, "denoising_strength": 1.0, "boundary": 0.9}
    assert torch.equal(both("a cat", **arguments), one("a cat", **arguments))


def test_one_expert_alone_is_refused(checkpoint, tmp_path):
    folder = checkpoint("tiny-a14b")
    manager = ModelManager(torch_dtype=torch.float32)
    manager.load_models([folder], model_names=["wan_video_dit", "wan_video_text_encoder", "wan_video_vae"])
    with pytest.raises(ValueError, match="is one of two experts; load the low-noise one as well"):
        WanVideoPipeline.from_model_manager(manager)
    shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "high_noise_model")
    with pytest.raises(FileNotFoundError, match="wan_video_dit; the low-noise expert is one of two"):
        WanVideoPipeline.from_pretrained(tmp_path / "half", device="cpu")
    manager.load_models([folder / "low_noise_model"])
    pipe = WanVideoPipeline.from_model_manager(manager)
    assert pipe.models.experts == ("dit", "low_noise_dit")


@pytest.mark.parametrize(
    ("name", "expert"),
    {
        "Wan2_2-T2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors": "high",
        "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors": "low",
        "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf": "high",
        "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": "low",
        "wan2.2 mine LOW.safetensors": "low",
        "mine_high.safetensors": "high",
        "mine-low.safetensors": "low",
        "low_poly.safetensors": None,
        "SLOW_MOTION.safetensors": None,
        "HIGHLIGHTS.safetensors": None,
        "high_quality.safetensors": None,
    }.items(),
)
def test_an_expert_is_told_by_the_names_that_files_have(tmp_path, name, expert):
    assert expert_of(tmp_path / name) == expert


def test_an_expert_that_is_asked_for_needs_no_name(checkpoint, tmp_path):
    pair = checkpoint("tiny-a14b")
    whole = WanVideoPipeline.from_pretrained(pair, device="cpu")
    for folder, expert in (("high_noise_model", "a"), ("low_noise_model", "b")):
        shutil.copytree(pair / folder, tmp_path / expert)
    given = {"dit": tmp_path / "a", "low_noise_dit": tmp_path / "b"}
    named = WanVideoPipeline.from_pretrained(pair, device="cpu", **given)
    assert torch.equal(named("a cat", **SMALL), whole("a cat", **SMALL))


LAYER = "blocks.1.ffn.0"


def lora_file(path, seed=0):
    """A LoRA of rank 2 for one layer of the tiny experts, in official names; its change of the weight."""
    draw = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 24, generator=draw), torch.randn(48, 2, generator=draw)
    path.parent.mkdir(exist_ok=True)
    save_file(
        {f"diffusion_model.{LAYER}.lora_A.weight": down, f"diffusion_model.{LAYER}.lora_B.weight": up}, path
    )
    return up @ down


def test_a_published_pair_runs_with_its_published_defaults(checkpoint, tmp_path):
    folder = tmp_path / "Wan2.2-T2V-A14B"  # the name alone tells that it is published
    shutil.copytree(checkpoint("tiny-a14b"), folder)
    pipe = WanVideoPipeline.from_pretrained(folder, device="cpu")
    named = ("num_inference_steps", "sigma_shift", "cfg_scale", "low_noise_cfg_scale", "boundary")
    assert [pipe.defaults[name] for name in named] == [40, 12.0, 4.0, 3.0, 0.875]
    assert pipe.defaults == run_defaults(folder)


def test_each_expert_takes_the_lora_of_its_name(checkpoint, tmp_path, caplog):
    pipe = WanVideoPipeline.from_pretrained(checkpoint("tiny-a14b"), device="cpu")
    manager, dits = pipe._manager, (pipe.dit, pipe.models.low_noise_dit)
    before = [dit.get_submodule(LAYER).weight.clone() for dit in dits]

    def changes():
        return [dit.get_submodule(LAYER).weight - own for dit, own in zip(dits, before, strict=True)]

    high = tmp_path / "wan2.2_t2v_A14b_high_noise_lora_rank64.safetensors"
    low = tmp_path / "lightning_LOW_fp16.safetensors"
    of_high, of_low = lora_file(high, 1), lora_file(low, 2)
    manager.load_lora(high)
    manager.load_lora(low, 0.5)
    for found, expected in zip(changes(), (of_high, 0.5 * of_low), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    manager.change_lora(low, -1.0)
    torch.testing.assert_close(changes()[1], -of_low, atol=1e-5, rtol=0)
    torch.testing.assert_close(changes()[0], of_high, atol=1e-5, rtol=0)
    manager.unload_lora(high)
    assert torch.equal(dits[0].get_submodule(LAYER).weight, before[0])
    with pytest.raises(CheckpointError, match="is of the high-noise expert, not of the low-noise one"):
        manager.load_lora(high, expert="low")
    with pytest.raises(CheckpointError, match="is of the low-noise expert, not of the high-noise one"):
        pipe.load_lora(pipe.dit, low)
    with pytest.raises(ValueError, match="expert must be one of high, low or None; got 'middle'"):
        manager.load_lora(high, expert="middle")
    manager.unload_lora()
    assert all(
        torch.equal(dit.get_submodule(LAYER).weight, own) for dit, own in zip(dits, before, strict=True)
    )
    # A file that names no expert changes both, unless the caller says which.
    style = tmp_path / "style.safetensors"
    of_both = lora_file(style, 3)
    with caplog.at_level("INFO"):
        manager.load_lora(style)
    assert "style.safetensors does not name an expert: it changes both" in caplog.text
    for found in changes():
        torch.testing.assert_close(found, of_both, atol=1e-5, rtol=0)
    pipe.clear_lora()
    pipe.load_lora(pipe.models.low_noise_dit, style)
    torch.testing.assert_close(changes()[1], of_both, atol=1e-5, rtol=0)
    assert not changes()[0].any()


def test_the_loras_of_a_pair_are_told_by_the_command_line_names(checkpoint, tmp_path):
    """Two files named like their experts, in a mapping as the command passes them."""
    files = {tmp_path / "high_noise_model.safetensors": 1.0, tmp_path / "low_noise_model.safetensors": 2.0}
    made = [lora_file(path, seed) for seed, path in enumerate(files)]
    plain = WanVideoPipeline.from_pretrained(checkpoint("tiny-a14b"), device="cpu")
    pipe = WanVideoPipeline.from_pretrained(checkpoint("tiny-a14b"), device="cpu", loras=files)
    for name, strength, change in zip(plain.models.experts, (1.0, 2.0), made, strict=True):
        own, other = (getattr(p.models, name).get_submodule(LAYER).weight for p in (pipe, plain))
        torch.testing.assert_close(own - other, strength * change, atol=1e-5, rtol=0)


def test_the_relay_holds_little_more_than_one_expert(checkpoint, monkeypatch):
    """Bytes of DiT weights on the device at once, counted at every copy to it."""
    pipe = WanVideoPipeline.from_pretrained(checkpoint("tiny-a14b"), device="cpu")
    experts = [getattr(pipe.models, name) for name in pipe.models.experts]
    sizes = [sum(tensor.nbytes for tensor in dit.state_dict().values()) for dit in experts]
    weights = {tensor.data_ptr() for dit in experts for tensor in dit.state_dict().values()}
    alive, peaks = [0], []

    def copied(_device, tensor):
        made = tensor.clone()
        if tensor.data_ptr() in weights:
            alive[0] += made.nbytes
            peaks.append(alive[0])
            weakref.finalize(
                made.untyped_storage(), lambda size=made.nbytes: alive.__setitem__(0, alive[0] - size)
            )
        return made

    monkeypatch.setattr(residency, "copy_to", copied)
    pipe("a cat", **SMALL)
    assert sum(sizes) > max(peaks) >= min(sizes)
    assert max(peaks) <= 1.05 * max(sizes)
    assert alive == [0]


def test_each_expert_is_guided_by_its_own_numbers(checkpoint, monkeypatch, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(checkpoint("tiny-a14b"), folder)
    pipe = WanVideoPipeline.from_pretrained(folder, device="cpu")
    clip = [PICTURE.rotate(15 * angle) for angle in range(5)]
    motion = {"guided_steps": 3, "inner_steps": 1, "block": 1, "sf": 2, "mode": "AMF", "lr": (0.05, 0.04)}
    call = {**SMALL, "input_video": clip, "motion": MotionGuidance(**motion), "boundary": 0.8}
    seen = []

    def watched(dit, *given, guidance, **more):
        number = pipe.models.experts.index("dit" if dit is pipe.dit else "low_noise_dit")
        seen.append((number, guidance.block, guidance.lr, guidance.amf_weight))
        return guided_step(dit, *given, guidance=guidance, **more)

    monkeypatch.setattr(denoise, "guided_step", watched)
    alike = pipe("a cat", **call)
    assert [number for number, *_ in seen] == [0, 0, 1]  # the boundary lies inside the guided steps
    assert torch.equal(pipe("a cat", **call, low_noise_motion={"lr": [0.05, 0.04], "block": 1}), alike)
    seen.clear()
    own = {"lr": (0.02, 0.01), "block": 0, "amf_weight": 2}
    (made,) = pipe.run("a cat", **call, low_noise_motion=own, motion_scale=0.5)
    assert seen == [(0, 1, (0.025, 0.02), 5.0)] * 2 + [(1, 0, (0.01, 0.005), 2)]
    assert not torch.equal(made.latents, pipe("a cat", **call, motion_scale=0.5))
    recorded = json.loads(json.dumps(made.options.to_json()))
    assert recorded["low_noise_motion"] == {"lr": [0.01, 0.005], "block": 0, "amf_weight": 2}
    assert RunOptions.from_json(recorded) == made.options
    # A checkpoint declares them beside its other options; the caller's go first.
    config = folder / "high_noise_model" / "config.json"
    declared = {**json.loads(config.read_text()), "fastvmt": {"low_noise_motion": {"amf_weight": 3.0}}}
    config.write_text(json.dumps(declared))
    pipe = WanVideoPipeline.from_pretrained(folder, device="cpu")
    for more, weight in (({}, 3.0), ({"low_noise_motion": {"amf_weight": 4.0}}, 4.0)):
        seen.clear()
        pipe("a cat", **call, **more)
        assert seen[-1][-1] == weight


@pytest.mark.parametrize("wrong", [{"mode": "AMF"}, {"guided_steps": 3}, {"speed": 3}, {"lr": -1}, 5, "lr=1"])
def test_numbers_that_the_low_noise_expert_cannot_have_are_refused_by_name(checkpoint, wrong):
    pipe = WanVideoPipeline.from_pretrained(checkpoint("tiny-a14b"), device="cpu")
    with pytest.raises(ValueError, match="low_noise_motion must be numbers of motion by name, but mode, "):
        pipe("a cat", **SMALL, low_noise_motion=wrong)
    clip = [PICTURE] * 5
    with pytest.raises(ValueError, match="block must be in "):
        pipe("a cat", **SMALL, input_video=clip, low_noise_motion={"block": 99})


def test_numbers_of_the_low_noise_expert_are_read_from_text():
    kind = options_of(RunOptions)["low_noise_motion"][0].kind
    assert kind.read("lr=0.002,0.001 amf_weight=3") == {"lr": (0.002, 0.001), "amf_weight": 3.0}
    assert kind.read("heads=0,1") == {"heads": (0, 1)}
    for wrong in ("lr", "speed=3", "amf_weight=x"):
        with pytest.raises(ValueError, match="low_noise_motion must be numbers of motion by name"):
            check_value("low_noise_motion", kind, wrong, as_text=True)


def test_one_expert_at_a_time_is_on_the_device(checkpoint, monkeypatch):
    pipe = WanVideoPipeline.from_pretrained(checkpoint("tiny-a14b"), device="cpu")
    whole = pipe("a cat", **SMALL)
    assert pipe.residency.offload
    stays = []
    using, rest = pipe.residency.using, pipe.residency.rest
    monkeypatch.setattr(pipe.residency, "using", lambda *names: stays.append(names) or using(*names))
    monkeypatch.setattr(pipe.residency, "rest", lambda *names: stays.append(("rest", *names)) or rest(*names))
    assert torch.equal(pipe("a cat", **SMALL), whole)
    in_order = [names for names in stays if "dit" in names[-1]]
    assert in_order == [("dit",), ("rest", "dit"), ("low_noise_dit",), ("rest", "low_noise_dit")]
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert set(pipe.residency.streaming) == {"dit", "low_noise_dit"}
    assert torch.equal(pipe("a cat", **SMALL), whole)
    torch.testing.assert_close(pipe("a cat", **SMALL, vram_budget_gb=4), whole, atol=1e-4, rtol=0)
    assert pipe.residency.offload


@pytest.mark.parametrize("size", ["tiny-i2v", "tiny-ti2v", "tiny-a14b"])
def test_an_unfinished_run_continues_to_the_same_bits(checkpoint, size, tmp_path):
    pipe = WanVideoPipeline.from_pretrained(checkpoint(size), device="cpu")
    given = {} if size == "tiny-a14b" else {"input_image": PICTURE}
    whole = pipe("a cat", **given, **SMALL)

    def stop(pipe, step, *_):
        if step == 1:
            pipe.interrupt()

    saving = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    pipe("a cat", **given, **SMALL, **saving, callback_on_step_end=stop)
    if given:
        with pytest.raises(ValueError, match="differs in input_image"):
            pipe("a cat", input_image=PICTURE.rotate(90), **SMALL, **saving)
    assert torch.equal(pipe("a cat", **given, **SMALL, **saving), whole)


def diffusers_names(weights):
    """DiT weights under diffusers names."""
    found = {}
    for key, value in weights.items():
        path, _, tensor = key.rpartition(".")
        theirs = {
            "head.modulation": "scale_shift_table",
            "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        }.get(key)
        if theirs is None:
            theirs = (
                f"{path}.scale_shift_table"
                if tensor == "modulation"
                else f"{diffusers_module(path)}.{tensor}"
            )
        found[theirs] = value.contiguous()
    return found


@pytest.mark.parametrize("layout", ["diffusers", "comfy"])
@pytest.mark.parametrize("size", ["tiny-a14b", "tiny-i2v", "tiny-flf2v", "tiny-ti2v"])
def test_other_layouts_load_to_the_same_video(checkpoint, size, layout, tmp_path):
    official = checkpoint(size)
    whole = WanVideoPipeline.from_pretrained(official, device="cpu")
    names = {size: ["input_image"], "tiny-flf2v": ["input_image", "end_image"], "tiny-a14b": []}
    given = dict.fromkeys(names.get(size, ()), PICTURE)
    files = {"dit": "wan2.2_t2v_high_noise_14B_fp16", "low_noise_dit": "wan2.2_t2v_low_noise_14B_fp16"}
    folders = {"dit": "transformer", "low_noise_dit": "transformer_2"}
    for name in whole.models.experts:
        weights = getattr(whole.models, name).state_dict()
        is_comfy = layout == "comfy"
        folder = tmp_path / ("diffusion_models" if is_comfy else folders[name])
        folder.mkdir(exist_ok=True)
        stem = files[name] if is_comfy and size == "tiny-a14b" else "wan2.1_i2v" if is_comfy else "model"
        weights = {k: v.contiguous() for k, v in weights.items()} if is_comfy else diffusers_names(weights)
        save_file(weights, folder / f"{stem}.safetensors")
        (folder / "config.json").write_text('{"num_attention_heads": 2}')
    if whole.models.image_encoder is not None:
        folder = tmp_path / ("clip_vision" if layout == "comfy" else "image_encoder")
        folder.mkdir()
        names = ("text_model.final_layer_norm.weight", "text_projection.weight", "logit_scale")
        text = {name: torch.ones(1) for name in names if layout == "comfy"}  # a whole CLIP has both halves
        clip = transformers_names(whole.models.image_encoder.state_dict())
        save_file({**clip, **text}, folder / "model.safetensors")
    for pattern in ("*.pth", "google"):
        for path in official.glob(pattern):
            if "clip" not in path.name:
                (tmp_path / path.name).symlink_to(path)
    pipe = WanVideoPipeline.from_pretrained(tmp_path, device="cpu")
    assert pipe.models.experts == whole.models.experts
    expected = whole("a cat", **given, **SMALL)
    torch.testing.assert_close(pipe("a cat", **given, **SMALL), expected, atol=1e-4, rtol=0)


def transformers_names(weights):
    """Weights of the image encoder under transformers' names; its last block, which nobody reads, is zero."""
    last = {key: value * 0 for key, value in weights.items() if key.startswith("transformer.0.")}
    found = {}
    for key, value in {**weights, **{k.replace(".0.", ".2.", 1): v for k, v in last.items()}}.items():
        for ours, theirs in {
            "pre_norm": "vision_model.pre_layrnorm", "transformer": "vision_model.encoder.layers",
            ".norm": ".layer_norm", "attn.proj": "self_attn.out_proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2",
            "patch_embedding": "vision_model.embeddings.patch_embedding",
        }.items():  # fmt: skip
            key = key.replace(ours, theirs)
        if "to_qkv" in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {key.replace("attn.to_qkv", f"self_attn.{n}_proj"): v.clone() for n, v in parts}
        else:
            found[key] = value.clone()
    found["vision_model.embeddings.class_embedding"] = found.pop("cls_embedding").flatten()
    found["vision_model.embeddings.position_embedding.weight"] = found.pop("pos_embedding")[0]
    return found
