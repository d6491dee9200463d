"""CLIP similarity by a tiny random CLIP in the published layout."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth.evaluation.text_similarity import load_clip, temporal_consistency_clip, text_similarity

SIZE = 24


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of one layer that reads 16 tokens: letters, and two of them that end a word."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({name: index for index, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(names), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**layers, **text, "pad_token_id": 1},
        vision_config={**layers, "image_size": SIZE, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder):
    return load_clip(clip_folder, device="cpu")


def noise_video(seed, num_frames=5, height=40, width=64):
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def test_the_similarity_is_the_mean_cosine_that_the_whole_model_gives(clip):
    import transformers

    video = noise_video(0, num_frames=20)
    # The name of the one that does without torchvision, from transformers 5 on.
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    processor = getattr(transformers, name)(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    pixels = processor([Image.fromarray(frame) for frame in video], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = clip.model(pixel_values=pixels, **clip.tokenizer("a red car", return_tensors="pt"))
    cosines = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    assert text_similarity(video, "a red car", clip=clip) == pytest.approx(cosines.mean().item(), abs=1e-5)
    pairs = torch.nn.functional.cosine_similarity(out.image_embeds[1:], out.image_embeds[:-1])
    assert temporal_consistency_clip(video, clip=clip) == pytest.approx(pairs.mean().item(), abs=1e-5)


def test_text_and_frames_both_count(clip):
    video = noise_video(0)
    scores = [text_similarity(video, prompt, clip=clip) for prompt in ("a red car", "two dogs")]
    assert abs(scores[0] - scores[1]) > 1e-3
    assert abs(scores[0] - text_similarity(video // 4, "a red car", clip=clip)) > 1e-3


def test_only_the_middle_square_is_seen(clip):
    video = noise_video(1, height=48, width=100)
    wider = np.concatenate(
        [noise_video(2, height=48, width=20), video, noise_video(3, height=48, width=20)], 2
    )
    assert text_similarity(wider, "a", clip=clip) == pytest.approx(
        text_similarity(video, "a", clip=clip), abs=2e-3
    )


def test_a_still_video_is_consistent_and_a_flickering_one_less(clip):
    frame = noise_video(4)[:1]
    assert temporal_consistency_clip(np.repeat(frame, 4, 0), clip=clip) == pytest.approx(1, abs=1e-5)
    assert temporal_consistency_clip(np.stack([frame[0], 255 - frame[0]] * 2), clip=clip) < 0.999
    with pytest.raises(ValueError, match="frames must be two or more; got 1"):
        temporal_consistency_clip(frame, clip=clip)


def test_a_prompt_that_is_too_long_counts_up_to_what_clip_reads(clip, caplog):
    video = noise_video(0)
    with caplog.at_level(logging.WARNING):
        long = text_similarity(video, "abcdefghijklmn and more", clip=clip)
    assert "CLIP reads 16 tokens; the last 7 of the prompt do not count" in caplog.text
    caplog.clear()
    assert text_similarity(video, "abcdefghijklmn or other", clip=clip) == pytest.approx(long)
    caplog.clear()
    assert text_similarity(video, "abcdefg", clip=clip) != pytest.approx(long, abs=1e-4)
    assert "do not count" not in caplog.text


def test_the_folder_may_be_an_argument_or_in_the_environment(clip, clip_folder, monkeypatch):
    video = noise_video(0)
    expected = text_similarity(video, "a red car", clip=clip)
    assert text_similarity(video, "a red car", clip=clip_folder) == expected
    monkeypatch.setenv("DIFFSYNTH_CLIP", str(clip_folder))
    assert text_similarity(video, "a red car") == expected


def test_a_missing_clip_names_the_command_that_fetches_it(clip_folder, monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFSYNTH_CLIP", raising=False)
    monkeypatch.chdir(tmp_path)
    command = "hf download openai/clip-vit-base-patch32 --local-dir models/clip-vit-base-patch32"
    with pytest.raises(FileNotFoundError, match=f"config.json is missing.*{command}"):
        text_similarity(noise_video(0), "a red car")
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "vocab.json"):
        (half / name).write_bytes((clip_folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"model.safetensors or .*pytorch_model.bin is missing"):
        load_clip(half)


def test_weights_that_lack_a_part_of_clip_are_refused(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is no CLIP: it lacks visual_projection.weight"):
        load_clip(tmp_path, device="cpu")


@pytest.mark.parametrize("prompt", ["", "  ", None])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(prompt):
    with pytest.raises(ValueError, match="prompt must be a text with words in it; got"):
        text_similarity(noise_video(0), prompt)
