"""The download script: what a complete folder is, what is fetched, and what is said when fetching fails."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save_file

from diffsynth.configs.checkpoints import PUBLISHED, PublishedCheckpoint
from diffsynth.jobs import download as download_module
from diffsynth.jobs.download import DownloadError, download, expected_bytes, missing_files
from diffsynth.models.wan_video_dit import WanModel

TINY = PublishedCheckpoint(
    name="Tiny",
    model_id="Someone/Tiny",
    folder="Tiny",
    files={
        "config.json": None,
        "dit-1-of-2.safetensors": None,
        "dit-2-of-2.safetensors": None,
        "t5.pth": 1000,
        "google/umt5-xxl/spiece.model": 10,
    },
    num_parameters=64,
    dit_kwargs={},
)
SNAPSHOT = {
    "modelscope": ("modelscope.snapshot_download", "allow_file_pattern"),
    "huggingface": ("huggingface_hub.snapshot_download", "allow_patterns"),
}
EVERY_SOURCE = pytest.mark.parametrize("source", sorted(SNAPSHOT))


def write(folder: Path, paths) -> None:
    for name in paths:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps({"dim": 8}))
        elif path.suffix == ".safetensors":
            save_file({"weight": torch.zeros(4, 8), "bias": torch.zeros(4)}, path, metadata={"format": "pt"})
        else:
            path.write_bytes(bytes(TINY.files[name]))


@pytest.fixture
def hub(monkeypatch):
    """Put a hub that writes the wanted files in the place of both; return the list of its calls."""
    calls = []

    def install(source: str, deliver=write):
        target, patterns_name = SNAPSHOT[source]

        def snapshot_download(model_id, *, local_dir, **options):
            paths = options.pop(patterns_name)
            assert not options
            calls.append((model_id, local_dir, paths))
            deliver(Path(local_dir), paths)

        monkeypatch.setattr(target, snapshot_download)
        return calls

    return install


def script_main(arguments: list[str]) -> int:
    path = Path(__file__).parents[1] / "examples" / "download_model.py"
    spec = importlib.util.spec_from_file_location("download_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)


@EVERY_SOURCE
def test_a_download_makes_the_folder_complete_and_asks_for_the_needed_files_alone(hub, tmp_path, source):
    calls = hub(source)
    assert download(TINY, tmp_path, source) == tmp_path / "Tiny"
    assert calls == [("Someone/Tiny", str(tmp_path / "Tiny"), list(TINY.files))]
    assert missing_files(tmp_path / "Tiny", TINY) == []


def test_a_complete_folder_is_left_alone(hub, tmp_path):
    calls = hub("modelscope")
    write(tmp_path / "Tiny", TINY.files)
    assert download(TINY, tmp_path) == tmp_path / "Tiny"
    assert calls == []


def test_only_what_is_missing_or_damaged_is_asked_for(hub, tmp_path):
    calls = hub("modelscope")
    write(tmp_path / "Tiny", TINY.files)
    (tmp_path / "Tiny" / "config.json").unlink()
    (tmp_path / "Tiny" / "t5.pth").write_bytes(bytes(999))
    download(TINY, tmp_path)
    assert calls[0][2] == ["config.json", "t5.pth"]


def test_an_empty_folder_lacks_every_file(tmp_path):
    assert missing_files(tmp_path / "nowhere", TINY) == [f"{path}: missing" for path in TINY.files]


def damaged_file_cases():
    def cut(keep):
        return lambda data: data[:keep]

    return [
        ("t5.pth", cut(999), "t5.pth: 999 bytes, should be 1,000"),
        ("config.json", cut(5), "config.json: not readable as JSON, perhaps cut off"),
        ("config.json", cut(0), "config.json: not readable as JSON, perhaps cut off"),
        ("dit-1-of-2.safetensors", cut(-1), "bytes, its header promises"),
        ("dit-1-of-2.safetensors", lambda data: data + b"0", "bytes, its header promises"),
        ("dit-1-of-2.safetensors", cut(40), "40 bytes, cut off within its header"),
        ("dit-1-of-2.safetensors", cut(4), "not a safetensors file"),
        ("dit-1-of-2.safetensors", lambda _: b"<html>" * 100, "not a safetensors file"),
        ("dit-1-of-2.safetensors", lambda data: data[:8] + b"x" * (len(data) - 8), "not a safetensors file"),
    ]


@pytest.mark.parametrize(("name", "damage", "message"), damaged_file_cases())
def test_a_damaged_file_is_noticed_without_a_network(tmp_path, name, damage, message):
    write(tmp_path, TINY.files)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    (fault,) = missing_files(tmp_path, TINY)
    assert fault.startswith(name)
    assert message in fault


def no_network_cases():
    import requests
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from modelscope.hub.errors import FileDownloadError, NotExistError

    response = requests.Response()
    return [
        ("modelscope", FileDownloadError("hub is away")),
        ("modelscope", NotExistError("hub is away")),
        ("modelscope", requests.ConnectionError("hub is away")),
        ("modelscope", requests.HTTPError("hub is away", response=response)),
        ("huggingface", LocalEntryNotFoundError("hub is away")),
        ("huggingface", HfHubHTTPError("hub is away", response=response)),
        ("huggingface", OfflineModeIsEnabled("hub is away")),
    ]


@pytest.mark.parametrize(("source", "error"), no_network_cases())
def test_a_hub_that_fails_is_named_with_the_reason_and_the_commands_to_run_by_hand(
    hub, tmp_path, source, error
):
    def fail(*_):
        raise error

    hub(source, fail)
    folder = tmp_path / "my models" / "Tiny"
    with pytest.raises(DownloadError) as caught:
        download(TINY, tmp_path / "my models", source)
    message = str(caught.value)
    assert f"Could not fetch Tiny (Someone/Tiny at {source}.c" in message
    assert "hub is away" in message
    assert f"modelscope download --model Someone/Tiny --local_dir '{folder}'" in message
    assert f"hf download Someone/Tiny --local-dir '{folder}'" in message
    assert caught.value.__cause__ is error


def test_an_error_that_is_no_hub_failure_is_not_dressed_up_as_one(hub, tmp_path):
    def fail(*_):
        raise ZeroDivisionError

    hub("modelscope", fail)
    with pytest.raises(ZeroDivisionError):
        download(TINY, tmp_path)


@EVERY_SOURCE
def test_a_hub_that_delivers_too_little_is_not_believed(hub, tmp_path, source):
    hub(source, lambda folder, paths: write(folder, [path for path in paths if path != "t5.pth"]))
    with pytest.raises(DownloadError, match=r"still incomplete: t5\.pth: missing"):
        download(TINY, tmp_path, source)


@EVERY_SOURCE
def test_a_hub_library_that_is_not_installed_is_named(monkeypatch, tmp_path, source):
    library = SNAPSHOT[source][0].split(".")[0]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DownloadError, match=f"pip install {library}"):
        download(TINY, tmp_path, source)


def free_space(monkeypatch, free: int) -> None:
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_too_little_disk_space_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    calls = hub("modelscope")
    huge = dataclasses.replace(TINY, files={**TINY.files, "t5.pth": 11_400_000_000})
    free_space(monkeypatch, 2_000_000_000)
    with pytest.raises(DownloadError, match=r"11\.4 GB are still to come into .*Tiny, 2\.0 GB are free"):
        download(huge, tmp_path / "not" / "there" / "yet")
    assert calls == []


def test_space_is_needed_for_missing_files_less_what_an_earlier_download_left(hub, tmp_path, monkeypatch):
    hub("modelscope")
    write(tmp_path / "Tiny", TINY.files)
    (tmp_path / "Tiny" / "t5.pth").unlink()
    (tmp_path / "Tiny" / "dit-2-of-2.safetensors").unlink()
    needed = 1000 + 4 * TINY.num_parameters // 2
    free_space(monkeypatch, needed - 301)
    with pytest.raises(DownloadError, match="Too little disk space"):
        download(TINY, tmp_path)
    unfinished = tmp_path / "Tiny" / ".cache" / "huggingface" / "download" / "t5.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(bytes(301))
    download(TINY, tmp_path)
    assert missing_files(tmp_path / "Tiny", TINY) == []


def test_an_unknown_source_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="source is 'ftp'; it must be one of: modelscope, huggingface"):
        download(TINY, tmp_path, "ftp")


@pytest.mark.parametrize("size", sorted(PUBLISHED))
def test_the_published_arguments_build_a_dit_of_the_published_size(size):
    checkpoint = PUBLISHED[size]
    with torch.device("meta"):
        dit = WanModel(**checkpoint.dit_kwargs)
    assert sum(p.numel() for p in dit.parameters()) == checkpoint.num_parameters


def test_the_published_folders_hold_what_inference_loads():
    small, large = PUBLISHED["1.3b"], PUBLISHED["14b"]
    shared = set(small.files) & set(large.files)
    assert {Path(path).name for path in shared} == {
        "config.json",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "Wan2.1_VAE.pth",
        "spiece.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    assert set(small.files) - shared == {"diffusion_pytorch_model.safetensors"}
    assert len(set(large.files) - shared) == 7
    header_bytes = small.files["diffusion_pytorch_model.safetensors"] - 4 * small.num_parameters
    assert 825 * 50 < header_bytes < 825 * 200
    total = sum(expected_bytes(large, path) for path in large.files)
    assert total == pytest.approx(69.0e9, rel=0.01)


def test_the_script_fetches_all_models_and_says_so(hub, tmp_path, monkeypatch, capsys):
    other = dataclasses.replace(TINY, name="Other", model_id="Someone/Other", folder="Other")
    monkeypatch.setattr("diffsynth.configs.checkpoints.PUBLISHED", {"tiny": TINY, "other": other})
    calls = hub("huggingface")
    options = ["--output_dir", str(tmp_path), "--source", "huggingface"]
    assert script_main(["--model", "all", *options]) == 0
    assert [call[0] for call in calls] == ["Someone/Tiny", "Someone/Other"]
    out = capsys.readouterr().out
    assert "Tiny: fetching 5 files from huggingface" in out
    assert f"Other: complete in {tmp_path / 'Other'}" in out
    shutil.rmtree(tmp_path / "Tiny")
    assert script_main(["--model", "other", *options]) == 0
    assert len(calls) == 2


def test_the_script_fails_with_the_message_and_exit_code_1(hub, tmp_path, monkeypatch, capsys):
    free_space(monkeypatch, 10**12)

    def fail(*_):
        raise ConnectionError("no route to host")

    hub("modelscope", fail)
    assert script_main(["--model", "1.3b", "--output_dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "Could not fetch Wan2.1-T2V-1.3B (Wan-AI/Wan2.1-T2V-1.3B at modelscope.cn)" in captured.err
    assert "no route to host" in captured.err
    assert "complete in" not in captured.out


def test_the_script_refuses_an_unknown_model(capsys):
    with pytest.raises(SystemExit) as caught:
        script_main(["--model", "7b"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("1.3b", "14b", "all"))


def test_the_folders_of_the_family_hold_their_own_parts():
    names = {key: set(checkpoint.files) for key, checkpoint in PUBLISHED.items()}
    assert list(names) == [
        "1.3b", "14b", "wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p", "wan2.1-flf2v-14b", "wan2.2-t2v-a14b",
        "wan2.2-i2v-a14b", "wan2.2-ti2v-5b",
    ]  # fmt: skip
    clip = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    assert [key for key, files in names.items() if clip in files] == list(names)[2:5]
    assert [key for key, files in names.items() if "Wan2.2_VAE.pth" in files] == ["wan2.2-ti2v-5b"]
    assert [key for key, files in names.items() if "Wan2.1_VAE.pth" not in files] == ["wan2.2-ti2v-5b"]
    assert [key for key, files in names.items() if "config.json" not in files] == list(names)[5:7]
    sizes = {
        key: sum(expected_bytes(checkpoint, path) for path in checkpoint.files) / 1e9
        for key, checkpoint in PUBLISHED.items()
    }
    # DiTs in float32, 11.4 GB of text encoder, VAE, CLIP.
    assert sizes["wan2.2-ti2v-5b"] == pytest.approx(20.0 + 11.4 + 2.82, abs=0.1)
    assert sizes["wan2.2-t2v-a14b"] == pytest.approx(2 * 57.15 + 11.4 + 0.51, abs=0.1)
    assert sizes["wan2.1-i2v-14b-480p"] == pytest.approx(65.6 + 11.4 + 0.51 + 4.77, abs=0.1)
    for expert in ("high", "low"):
        inside = {name for name in names["wan2.2-i2v-a14b"] if name.startswith(f"{expert}_noise_model/")}
        assert len(inside) == 6 + 2


def test_a_torch_file_of_unknown_size_must_be_whole(tmp_path):
    checkpoint = dataclasses.replace(TINY, files={"vae.pth": None})
    torch.save({"a": torch.zeros(100)}, tmp_path / "vae.pth")
    assert missing_files(tmp_path, checkpoint) == []
    whole = (tmp_path / "vae.pth").read_bytes()
    (tmp_path / "vae.pth").write_bytes(whole[:-30])
    found = missing_files(tmp_path, checkpoint)
    assert found == [f"vae.pth: {len(whole) - 30:,} bytes, cut off or no PyTorch file"]
