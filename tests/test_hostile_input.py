"""Files and prompts made to do harm: none runs code, fills the memory, hangs or crashes."""

import contextlib
import io
import json
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth import ModelManager, VideoData, WanVideoPipeline, decode_saved
from diffsynth.data.frames import read_picture
from diffsynth.models.checkpoint_files import CheckpointError
from diffsynth.prompters.wan_prompter import clean_prompt
from diffsynth.testing import write_checkpoint, write_clip

SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "seed": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hostile") / "tiny")


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return WanVideoPipeline.from_pretrained(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "ref.mp4", num_frames=5, height=32, width=32)


@pytest.fixture(autouse=True)
def _little_work():
    """No input may take long: processor time, which other programs on the machine do not add to."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < 60


def load(*files):
    ModelManager(device="cpu").load_models(list(files))


# Weights.


class Payload:
    """Writes a file when it is unpickled by whoever trusts it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "harm was done"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_with_code_are_refused_and_do_not_run(tmp_path, suffix, legacy):
    target, file = tmp_path / "harm", tmp_path / f"model{suffix}"
    if legacy:
        file.write_bytes(pickle.dumps({"weight": Payload(target)}))
    else:
        torch.save({"weight": Payload(target)}, file)
    with pytest.raises(CheckpointError, match=r"only plain tensor files are loaded|not a torch file"):
        load(file)
    assert not target.exists()


def safetensors_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


Q = "blocks.0.self_attn.q.weight"


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LYING = {
    "a header longer than the file": ({}, b"", 2**40),
    "a header that is no JSON": (b"{" * 1000,),
    "terabytes of data": ({Q: entry([2**20, 2**20], 0, 2**42)},),
    "a shape larger than its data": ({Q: entry([2**20, 2**20], 0, 4)}, b"abcd"),
    "a product of sizes that wraps around": ({Q: entry([2**32, 2**32], 0, 0)},),
    "tensors over each other": ({Q: entry([1], 0, 4), "b": entry([1], 2, 6)}, b"abcdef"),
    "offsets that go backwards": ({Q: entry([1], 4, 0)}, b"abcd"),
    "a dtype that there is not": ({Q: entry([1], 0, 4, "F99")}, b"abcd"),
}


@pytest.mark.parametrize("lie", LYING)
def test_lying_headers_are_refused(tmp_path, lie):
    with pytest.raises(CheckpointError, match=r"truncated or not a safetensors file|size cannot be told"):
        load(safetensors_file(tmp_path / "model.safetensors", *LYING[lie]))


@pytest.mark.parametrize(
    "declared", [{"text_len": 10**15}, {"num_heads": 10**15}, {"num_heads": 0}, {"text_len": "many"}]
)
def test_declared_sizes_that_no_model_has_are_refused_or_cost_nothing(checkpoint, tmp_path, declared):
    for file in checkpoint.glob("*diffusion*"):
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **declared}))
    (name,) = declared
    with pytest.raises(ValueError, match=name.split("_")[-1]):
        load(tmp_path)


def test_a_lora_of_another_model_is_refused_and_changes_nothing(checkpoint, tmp_path):
    manager = ModelManager(device="cpu")
    manager.load_models([checkpoint])
    before = {k: v.clone() for k, v in manager.fetch_model("wan_video_dit").state_dict().items()}
    name = "diffusion_model.blocks.0.self_attn.q.lora"
    save_file(
        {f"{name}_A.weight": torch.ones(4, 5120), f"{name}_B.weight": torch.ones(5120, 4)},
        tmp_path / "l.safetensors",
    )
    with pytest.raises(ValueError, match="5120"):
        manager.load_lora(tmp_path / "l.safetensors")
    after = manager.fetch_model("wan_video_dit").state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


# Videos and pictures.


def png(width, height, rows=b""):
    """A grey PNG that says it has this size, with as many zeros behind it as compress well."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (0, 0), (0, 5)])
def test_pictures_that_would_fill_the_memory_are_refused(tmp_path, size):
    (tmp_path / "1.png").write_bytes(png(*size, rows=bytes(10**7)))
    with pytest.raises(ValueError, match=r"1\.png"):
        list(VideoData(image_folder=tmp_path))


def test_a_photograph_with_a_second_picture_in_its_file_is_one_picture(tmp_path):
    photo, small = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (32, 32), "blue")
    photo.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[small])
    assert read_picture(tmp_path / "phone.jpg", "input_image").size == (64, 64)
    photo.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")])
    with pytest.raises(ValueError, match="input_image must be one picture; it is animated, 2 frames"):
        read_picture(tmp_path / "moving.gif", "input_image")


def test_one_pixel_is_a_picture(tmp_path, pipe):
    for index in range(5):
        Image.new("RGB", (1, 1), "red").save(tmp_path / f"{index}.png")
    video = VideoData(image_folder=tmp_path)
    assert video[0].size == (1, 1)
    frames = pipe("a cat", input_video=video, **SMALL)
    assert (len(frames), frames[0].size) == (5, (32, 32))


def test_a_video_cut_anywhere_is_read_as_far_as_it_goes_or_refused(clip, tmp_path):
    whole, path = clip.read_bytes(), tmp_path / "cut.mp4"
    for length in np.linspace(0, len(whole) - 1, 25).astype(int):
        path.write_bytes(whole[:length])
        frames = []
        with contextlib.suppress(ValueError):
            frames += [frame.size for frame in VideoData(path)]
        assert frames == [(32, 32)] * len(frames)
        assert len(frames) <= 5


def test_playlists_and_texts_are_no_videos(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for name, text in {
        "a.mp4": f"#EXTM3U\n#EXTINF:1,\nfile://{secret}\n",
        "b.mp4": f"ffconcat version 1.0\nfile '{secret}'\n",
        "concat:a.mp4|b.mp4": "",
    }.items():
        (tmp_path / name.replace("|", "_").replace(":", "_")).write_text(text)
        with pytest.raises((ValueError, FileNotFoundError)):
            list(VideoData(tmp_path / name))


@pytest.mark.parametrize(
    "shape", [(0, 32, 32, 3), (5, 0, 32, 3), (5, 32, 0, 3), (5, 32, 32, 2), (5, 32, 32), (0,)]
)
def test_frames_without_pixels_are_refused(pipe, shape):
    with pytest.raises((ValueError, TypeError)):
        pipe("a cat", input_video=np.zeros(shape, np.uint8), **SMALL)


def test_frames_of_the_wrong_numbers_are_refused(pipe):
    with pytest.raises((ValueError, TypeError)):
        pipe("a cat", input_video=np.full((5, 32, 32, 3), np.nan), **SMALL)


# Prompts.


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt", ["\0\x01\x1b[31mred\x7f", "\u202e\ufeff\ud7ff", "a" * 10**5, "\n" * 10**5, "&amp;" * 10**4]
)
def test_prompts_of_any_text_run(pipe, prompt):
    assert len(pipe(prompt, **SMALL)) == 5
    assert len(clean_prompt(prompt)) <= len(prompt)


def test_prompts_of_a_megabyte_are_refused(pipe):
    with pytest.raises(ValueError, match="prompt must have at most 100000 characters; got 1000000"):
        pipe("\n" * 10**6, **SMALL)


def test_prompts_that_are_no_text_are_refused(pipe):
    for prompt in (None, 3, b"a cat", [], [3]):
        with pytest.raises((TypeError, ValueError), match="prompt"):
            pipe(prompt, **SMALL)


# Latents.


def test_latents_without_numbers_are_refused(pipe, tmp_path):
    pipe("a cat", checkpoint_dir=tmp_path, **SMALL)
    (path,) = tmp_path.glob("latents-*.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({k: torch.full_like(v, torch.nan) for k, v in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match=path.name.split("-")[0]):
        decode_saved(path, pipe)


def test_noise_without_numbers_ends_in_words(pipe):
    pipe.dit.head.head.bias.data.fill_(torch.nan)
    try:
        with pytest.raises((ValueError, RuntimeError), match="finite"):
            pipe("a cat", **SMALL)
    finally:
        pipe.dit.head.head.bias.data.zero_()


def test_gif_bombs_end_at_the_size_of_their_frames(tmp_path):
    file = io.BytesIO()
    first, *rest = (Image.new("L", (64, 64), t) for t in range(60))
    first.save(file, "GIF", save_all=True, append_images=rest)
    content = bytearray(file.getvalue())
    content[6:10] = struct.pack("<HH", 65535, 65535)  # the canvas
    (tmp_path / "bomb.gif").write_bytes(content)
    with pytest.raises(ValueError, match=r"bomb\.gif"):
        list(VideoData(tmp_path / "bomb.gif"))
