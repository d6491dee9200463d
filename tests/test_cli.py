"""The `fastvmt` command, as a user types it: results, messages, exit codes."""

import inspect
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffsynth import VideoData, WanVideoPipeline, __version__
from diffsynth.cli import compare, doctor, inspect_motion, parser, progress, transfer
from diffsynth.cli import download as download_command
from diffsynth.cli.completion import commands_of
from diffsynth.cli.console import Console
from diffsynth.cli.main import COMMANDS, main
from diffsynth.cli.parser import build_parser
from diffsynth.configs import options
from diffsynth.configs.caches import CACHES
from diffsynth.configs.checkpoints import PUBLISHED, PUBLISHED_DEFAULTS, checkpoint_folder
from diffsynth.configs.defaults import run_defaults
from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.configs.fields import load, options_of
from diffsynth.configs.resolve import resolve, resolve_prompts
from diffsynth.data import frames, writer
from diffsynth.jobs import models, publish, task
from diffsynth.jobs.download import DownloadError
from diffsynth.jobs.publish import check_folder
from diffsynth.jobs.task import task_options
from diffsynth.models.attention import BACKENDS
from diffsynth.models.model_manager import DTYPES
from diffsynth.motion import MotionGuidance
from diffsynth.pipelines.components import reference_facts
from diffsynth.runs.record import read_record, record_path
from diffsynth.testing import write_clip

QUICK = ["--steps", "3", "--motion-guided-steps", "1", "--motion-inner-steps", "2", "--seed", "1"]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "ref.mp4", num_frames=5, height=32, width=32)


@pytest.fixture
def transferring(tiny_checkpoint, clip, tmp_path):
    """The arguments of a quick transfer to out.mp4 in tmp_path."""
    output = ["-o", str(tmp_path / "out.mp4")]
    return ["transfer", str(clip), "--prompt", "a cat", "--model", str(tiny_checkpoint), *output, *QUICK]


@pytest.fixture
def no_load(monkeypatch):
    """Loading a model is an error of its own kind."""

    def load(*_given):
        raise AssertionError("the model was loaded")

    for module in (transfer, inspect_motion):
        monkeypatch.setattr(module, "load_pipeline", load)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "cache")


# --- the command line ---------------------------------------------------------------------------------------


def test_help_comes_without_torch():
    code = (
        "import sys; from diffsynth.cli.main import main; code = main(['transfer', '--help']); "
        "print([m for m in ('torch', 'numpy', 'PIL', 'transformers') if m in sys.modules], code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[] 0\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_options_and_all_but_none_examples(command, capsys):
    assert main([command, "--help-all" if command in ("transfer", "batch", "plan") else "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: fastvmt {command}" in text
    assert "--json" in text
    assert f"examples:\n  {'eval' if command == 'completion' else f'fastvmt {command}'}" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["transfer"], 2, "a reference video is missing"),
        (["transfer", "none.mp4", "--prompt", "x"], 2, "video file none.mp4 does not exist"),
        (["compare", "none.mp4", "b.mp4", "-o", "c.mp4"], 2, "video file none.mp4 does not exist"),
        (["batch", "none.jsonl", "-o", "out"], 2, "jobs file none.jsonl does not exist"),
        (["inspect", sys.executable, "--model", "2B"], 2, "2B is neither a checkpoint folder nor one of the"),
        (["inspect", sys.executable, "--model", "wan2.2"], 2, "one of the names nano, nano-ti2v, 1.3b"),
        (["inspect", __file__], 2, "test_cli.py is a text and no video"),
        (["inspect", "golden"], 2, "folder golden holds no images (.png, "),
        (["plan", "--model", "14b", "--preset", "turbo"], 2, "preset must be one of exact, balanced, fast"),
        (["transfer", sys.executable, "--prompt", "x", "-o", "conftest.py"], 2, "output conftest.py exists"),
    ],
)
def test_what_is_missing_is_known_before_torch_is_imported(arguments, code, message):
    probe = (
        "import sys; from diffsynth.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", probe, *arguments]
    here = Path(__file__).parent
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    assert result.stdout == f"{code} False\n"
    assert message in result.stderr


def test_a_missing_device_is_told_before_the_model_that_is_chosen(clip, tmp_path, capsys):
    asked = ["transfer", clip, "--prompt", "x", "--models-dir", tmp_path, "--device", "cuda:99"]
    assert main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastvmt: device 'cuda:99' ")


def test_an_interrupt_while_the_command_is_imported_is_one_line():
    stop = "class Stop:\n def find_spec(self, name, *_):\n  if 'cli' in name: raise KeyboardInterrupt"
    code = f"import sys\n{stop}\nsys.meta_path.insert(0, Stop())\n"
    code += "from diffsynth.__main__ import start; sys.exit(start())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "fastvmt: interrupted\n")


def test_an_interrupt_while_torch_is_imported_is_one_line(monkeypatch, capsys):
    def interrupted(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffsynth.cli.main.import_module", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "fastvmt: interrupted\n"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("1.3B", "Wan2.1-T2V-1.3B"),
        ("14b", "Wan2.1-T2V-14B"),
        ("wan2.1-t2v-1.3b", "Wan2.1-T2V-1.3B"),
        ("Wan-AI/Wan2.1-T2V-14B", "Wan2.1-T2V-14B"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-1.3B"),
        ("Wan-AI/Wan2.2-TI2V-5B", "Wan2.2-TI2V-5B"),
    ],
)
def test_models_are_known_by_the_names_that_people_type(tmp_path, name, folder):
    (tmp_path / folder).mkdir()
    assert checkpoint_folder(name, tmp_path) == tmp_path / folder
    assert checkpoint_folder("NANO") == checkpoint_folder("nano")


def test_the_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastvmt {__version__}\n"


def test_names_that_configs_state_are_those_of_the_rooms():
    assert tuple(BACKENDS) == options.ATTENTION
    assert set(options.DTYPES) == {str(dtype).removeprefix("torch.") for dtype in DTYPES} - {"float64"}
    assert options.FITS == frames.FITS
    assert options.DEFAULT_FPS == writer.DEFAULT_FPS
    for path in [*options.SAMPLERS.values(), *(cache.rule for cache in CACHES.values())]:
        assert isinstance(load(path), type)
    for descriptor in DESCRIPTORS.values():
        assert isinstance(load(descriptor.make), type)


def test_every_number_of_the_method_and_every_argument_of_the_call_is_an_option():
    fields = [*options_of(MotionGuidance), *options.call_options(), *options_of(options.FileOptions)]
    text = parser.build_parser().format_help  # the parser of all commands can be made
    assert text()
    command = commands_of(parser.build_parser())["transfer"]
    offered = {action.dest for action in command._actions}
    offered |= {name.removeprefix("motion_") for name in offered}
    assert set(fields) - offered == {"motion", "output_type"}
    run = set(inspect.signature(WanVideoPipeline.run).parameters) - offered
    assert run == {
        "self", "input_video", "progress_bar_cmd", "callback_on_step_end", "stop",
        "observer", "test_latency", "latency_dir", "options",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see fastvmt --help)"),
        (["transform"], "argument COMMAND: invalid choice: 'transform'"),
        (["transfer", "--sampler", "ddim"], "--sampler: must be one of euler, unipc, renoise; got 'ddim'"),
        (["transfer", "--height", "tall"], "--height: must be a whole number from 1 to 16384; got 'tall'"),
        (["transfer", "--cfg-scale", "much"], "argument --cfg-scale: must be a finite number; got 'much'"),
        (["transfer", "--motion-tile", "3"], "--motion-tile: must be two values (rows, columns)"),
        (["transfer", "--motion-lr", "1,a"], "--motion-lr: must be two values (first, end)"),
        (["transfer", "--motion-heads", "0,a"], "token_groups or different head indices; got '0,a'"),
        (["transfer", "--mot", "3"], "unrecognized arguments: --mot"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_read_is_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_values_are_read_as_people_write_them():
    def read(*arguments):
        return vars(parser.build_parser().parse_args(["transfer", *arguments]))

    assert (
        read("--motion-tile", "3x4")["motion_tile"] == read("--motion-tile", "3,4")["motion_tile"] == (3, 4)
    )
    assert read("--motion-heads", "0,3")["motion_heads"] == (0, 3)
    assert read("--motion-heads", "mean_qk")["motion_heads"] == "mean_qk"
    assert read("--motion-token-scale", "none")["motion_token_scale"] is None
    assert "motion_token_scale" not in read()
    assert (read("--no-tiled")["tiled"], read("--frames", "9")["num_frames"]) == (False, 9)


def test_with_json_an_error_is_an_object_too(capsys):
    assert main(["transfer", "--json", "--prompt", "a cat"]) == 2
    captured = capsys.readouterr()
    error = json.loads(captured.out)
    assert error["exit_code"] == 2
    assert captured.err.endswith(f"fastvmt: {error['error']}\n")


def test_debug_shows_where_an_error_comes_from(tmp_path, capsys):
    arguments = ["transfer", "--from", tmp_path / "none.json", "-o", tmp_path / "a.mp4"]
    assert main([*arguments, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


# --- transfer -----------------------------------------------------------------------------------------------


def test_a_transfer_writes_video_and_record_and_prints_one_json_object(transferring, tmp_path, capsys):
    assert main([*transferring, "--json", "--motion-scale", "2", "--fps", "7", "--motion-tau", "3"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["output"] == str(tmp_path / "out.mp4")
    assert (len(VideoData(result["output"])), VideoData(result["output"]).fps) == (5, 7)
    record = read_record(result["record_file"])
    assert (record.cost["sampling_ffe"], record.cost["guidance_ffe"] > 0) == (6, True)
    assert record.to_json() == result["record"]
    motion = record.options["motion"]
    assert (motion["mode"], motion["lr"], motion["tau"]) == ("effi_AMF", [0.006, 0.004], 3)
    assert visible(tmp_path) == ["out.mp4", "out.mp4.json"]


def test_progress_names_the_stages_on_stderr_and_the_summary_is_on_stdout(transferring, tmp_path, capsys):
    assert main([*transferring, "--motion-interval", "1"]) == 0
    captured = capsys.readouterr()
    stages = ["load the model", "encode text", "encode video", "decode", "write"]
    places = [captured.err.index(f"{stage}\n") for stage in stages]
    assert places == sorted(places)
    # In a pipe: a line for each tenth of the steps.
    line = r"(\d+)%, step (\d)/3: \d+ s, \d+ s left; (guided 1/1, motion loss [+-]\d+%|sampling)"
    told = re.findall(line, captured.err)
    assert [part[:2] for part in told] == [("33", "1"), ("67", "2"), ("100", "3")]
    assert [part[2][:8] for part in told] == ["guided 1", "sampling", "sampling"]
    out = re.escape(f"{tmp_path}/out.mp4")
    assert re.fullmatch(
        rf"{out}: 5 frames of 32x32 at 15 frames a second, seed 1, [\d.]+ s\n"
        rf"to compare: fastvmt compare \S+ {out} --paths -o {tmp_path}/out-beside.mp4.*\n",
        captured.out,
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar_that_says_what_is_done(transferring, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main([*transferring, "--motion-interval", "1"]) == 0
    assert re.search(r"guided 1/1, motion loss [+-]\d+%: ", terminal.getvalue())
    assert re.search(r"sampling: 100%.*3/3", terminal.getvalue())


def test_help_shows_the_options_most_used_and_more_by_group(capsys):
    def shown(*arguments):
        code = main(["transfer", *arguments])
        captured = capsys.readouterr()
        return (
            code,
            set(re.findall(r"^  (?:-\w(?: \S+)?, )?(--[\w-]+)", captured.out, re.MULTILINE)),
            captured.err,
        )

    (code, common, _), (_, everything, _) = shown("--help"), shown("--help-all")
    assert code == 0
    assert {"--prompt", "--output", "--model", "--preset", "--mode", "--seed", "--motion-scale"} <= common
    assert len(common - {"--help", "--help-all"}) <= 14
    assert len(everything) > 80
    motion = shown("--help", "motion")[1]
    assert {name for name in everything if name.startswith("--motion-")} - motion == {"--motion-scale"}
    code, _, said = shown("--help", "colour")
    assert (code, "there is no such group; give a word of: what is printed, what is shown" in said) == (
        2,
        True,
    )


def test_a_gif_shows_the_result_beside_the_reference_once(transferring, tmp_path, capsys):
    assert main([*transferring, "--gif", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["beside"]
    assert shown == str(tmp_path / "out-beside.gif")
    video = VideoData(shown)
    assert video.shape() == (280, 516)
    assert len(video) == 5  # a GIF is repeated by what shows it


def test_quiet_says_nothing_but_the_result(transferring, capsys):
    assert main([*transferring, "--quiet", "--motion-guided-steps", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 2


def test_without_a_name_the_video_gets_a_free_one_of_reference_mode_and_seed(
    transferring, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    place = transferring.index("-o")
    unnamed = transferring[:place] + transferring[place + 2 :]
    assert main([*unnamed, "-q"]) == main([*unnamed, "-q", "--mode", "AMF"]) == main([*unnamed, "-q"]) == 0
    videos = ["ref-AMF-seed1.mp4", "ref-effi_AMF-seed1-2.mp4", "ref-effi_AMF-seed1.mp4"]
    assert [name for name in visible(tmp_path) if name.endswith(".mp4")] == videos


def test_text_alone_needs_no_transfer_by_name(tiny_checkpoint, tmp_path):
    output = tmp_path / "text.mp4"
    arguments = ["transfer", "--prompt", "a cat", "--mode", "No_transfer", "--model", tiny_checkpoint]
    size = ["--height", "32", "--width", "48", "--frames", "5", "--steps", "2", "--dtype", "float32"]
    assert main([*arguments, *size, "-o", output, "-q", "--attention", "sdpa", "--offload"]) == 0
    record = read_record(output)
    assert (record.reference, record.options["motion"]) == (None, None)
    assert record.model["setup"]["offload"] is True
    assert VideoData(output).shape() == (32, 48)


@pytest.mark.usefixtures("no_load")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "none.mp4"}, "video file none.mp4 does not exist"),
        ({"-o": "out.ogv"}, "output out.ogv must end in one of .mp4, .m4v, .mov, .mkv, .avi"),
        ({"-o": "there.mp4/out.mp4"}, "output folder there.mp4 cannot be made: there.mp4 is a file"),
        ({"--prompt": " "}, "--prompt is empty: what shall the video show?"),
        ({"--model": "wan2.2-TI2V-5B"}, "fetch it with: fastvmt download wan2.2-ti2v-5b"),
        ({"--model": "1.3B"}, "models/Wan2.1-T2V-1.3B does not exist; fetch it with: fastvmt download 1.3b"),
        ({"--model": "Wan-AI/Wan2.1-T2V-14B"}, "fetch it with: fastvmt download 14b"),
        ({"-o": "."}, "output . is a folder; give the name of a video file"),
        ({"-o": "~/out.mp4"}, "output ~/out.mp4: the shell did not expand ~; write $HOME"),
        ({"-o": "folder.mp4"}, "output folder.mp4 is a folder; give the name of a video file"),
        ({"-o": "there.mp4"}, "output there.mp4 exists; give another name, or --overwrite"),
        ({"-o": "link.mp4"}, "output link.mp4 exists; give another name, or --overwrite"),
        ({"-o": "mine.mp4"}, "mine.mp4.json exists and is no run record; give another name"),
        ({"--model": "2b"}, "2b is neither a checkpoint folder nor one of the names nano, nano-ti2v, 1.3b"),
        ({"--preset": "warp"}, "preset must be one of exact, balanced, fast; got 'warp'"),
        ({"--frames": "9"}, "num_frames is 9, but input_video has 5 frames"),
        (
            {"--motion-reuse": "never"},
            "must be one of repeat, falling, extrapolate; got 'never'",
        ),
        ({"--motion-window": "20"}, "window"),
        (
            {"--motion-scale": "0"},
            "--motion-scale: must be a finite number at least 0.001, at most 1000 or None; got '0'",
        ),
        ({"--mode": "No_transfer"}, "motion (guided_steps, inner_steps) has no effect in mode No_transfer"),
        ({"--checkpoint-every": "3"}, "--checkpoint-every needs --resume or --checkpoint-dir"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_loads(
    transferring, tmp_path, monkeypatch, capsys, changes, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "there.mp4").touch()
    (tmp_path / "mine.mp4.json").write_text("{}")
    (tmp_path / "link.mp4").symlink_to("nowhere.mp4")
    arguments = list(transferring)
    if "reference" in changes:
        arguments[1] = changes["reference"]
    else:
        arguments += [word for change in changes.items() for word in change]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert visible(tmp_path) == ["folder.mp4", "link.mp4", "mine.mp4.json", "there.mp4"]


@pytest.mark.usefixtures("no_load")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ref.mp4"], "--prompt is missing: what shall the video show?"),
        (["--prompt", "a cat"], "a reference video is missing; for a video from text alone give --mode"),
        (["ref.mp4", "--prompt", "a cat", "--resume"], "--resume needs -o OUT, or --checkpoint-dir"),
    ],
)  # fmt: skip
def test_a_transfer_that_lacks_something_says_what(arguments, message, clip, monkeypatch, capsys):
    monkeypatch.chdir(clip.parent)
    assert main(["transfer", *arguments, "--model", "nano"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("no_load")
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused(capsys, clip):
    assert main(["transfer", clip, "--prompt", "a cat", "-o", "/proc/out.mp4"]) == 2
    assert "output folder /proc cannot be written to" in capsys.readouterr().err


def test_overwrite_does_not_replace_what_the_video_is_made_from(transferring, clip, tmp_path, capsys):
    content = clip.read_bytes()
    (tmp_path / "link.mp4").symlink_to(clip)
    line = json.dumps({"reference": str(clip), "prompt": "a cat", "output": clip.name})
    (tmp_path / "jobs.jsonl").write_text(line)
    model = transferring[transferring.index("--model") + 1]
    for arguments in (
        [*transferring, "-o", str(clip)],
        [*transferring, "-o", str(tmp_path / "link.mp4")],
        ["compare", clip, clip, "-o", clip],
        ["batch", tmp_path / "jobs.jsonl", "-o", clip.parent, "--model", model],
    ):
        assert main([*arguments, "--overwrite"]) == (1 if arguments[0] == "batch" else 2)
        assert "would replace the video that it is made from" in capsys.readouterr().err
    assert clip.read_bytes() == content


def test_overwrite_replaces_a_video_and_a_failed_run_keeps_it(transferring, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.mp4"
    out.write_bytes(b"precious")

    def full(*_given, **_named):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(
            publish, "save_with_metadata", lambda *_a, **_k: (_ for _ in ()).throw(OSError("disk full"))
        )
        assert main([*transferring, "--overwrite"]) == 1
    kept = next(tmp_path.glob("out-latents-*.safetensors"))
    assert (out.read_bytes(), visible(tmp_path)) == (b"precious", [kept.name, "out.mp4"])
    message = capsys.readouterr().err
    assert "the video could not be written: disk full" in message
    assert (
        f"its final latents are kept: fastvmt decode {shlex.quote(str(kept))} -o OUT.mp4 makes it" in message
    )
    model = transferring[transferring.index("--model") + 1]
    assert main(["decode", kept, "-o", tmp_path / "late.mp4", "--model", model]) == 0
    assert main([*transferring, "--overwrite"]) == 0
    assert read_record(out).video["frames"] == len(VideoData(tmp_path / "late.mp4"))
    assert len(VideoData(out)) == 5


def test_a_name_that_is_taken_during_the_run_is_not_written_over(transferring, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.mp4"

    def meanwhile(*given, **named):
        out.write_bytes(b"of another run")
        return make_record(*given, **named)

    make_record = task.make_record
    monkeypatch.setattr(task, "make_record", meanwhile)
    assert main(transferring) == 0
    assert out.read_bytes() == b"of another run"
    assert len(VideoData(tmp_path / "out-2.mp4")) == 5
    assert record_path(tmp_path / "out-2.mp4").is_file()
    assert f"{out} was created meanwhile: the video is in {tmp_path / 'out-2.mp4'}" in capsys.readouterr().err


def test_a_file_system_without_hard_links_keeps_other_files_too(tmp_path, monkeypatch):
    def link(_file, path):
        raise (FileExistsError if path.exists() else PermissionError)("no links")

    monkeypatch.setattr(publish.os, "link", link)
    (tmp_path / "a.mp4").write_bytes(b"1")
    final = publish.write_output([], tmp_path / "a.mp4", lambda file: file.write_bytes(b"2"), overwrite=False)
    assert (final, (tmp_path / "a-2.mp4").read_bytes()) == (tmp_path / "a-2.mp4", b"2")
    assert visible(tmp_path) == ["a-2.mp4", "a.mp4"]


def test_a_run_that_fails_is_exit_code_1_and_writes_nothing(transferring, tmp_path, monkeypatch, capsys):
    def fail(*_given, **_named):
        raise RuntimeError("denoising gave values that are not finite")

    monkeypatch.setattr(WanVideoPipeline, "run", fail)
    assert main(transferring) == 1
    assert "fastvmt: denoising gave values that are not finite" in capsys.readouterr().err
    assert visible(tmp_path) == []


def test_a_damaged_model_is_a_failed_run(transferring, tiny_checkpoint, tmp_path, capsys):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (model / "Wan2.1_VAE.pth").write_bytes(b"cut off")
    assert main([*transferring, "--model", model]) == 1
    assert "the model cannot be loaded" in capsys.readouterr().err


class InterruptedAtStep(progress.StageProgress):
    """Ctrl-C is pressed `times` times after the first sampling step."""

    times = 1
    steps = 0

    def __call__(self, event):
        super().__call__(event)
        if event.stage == "sampling" and event.step:
            type(self).steps = event.step
            if event.step == 1:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_stops_the_run_and_leaves_nothing(transferring, tmp_path, monkeypatch, capsys, times):
    monkeypatch.setattr(InterruptedAtStep, "times", times)
    monkeypatch.setattr(progress, "StageProgress", InterruptedAtStep)
    before = signal.getsignal(signal.SIGINT)
    assert main(transferring) == 130
    said = capsys.readouterr().err
    assert "stopping after this step; Ctrl-C again stops at once" in said
    assert said.endswith("fastvmt: interrupted; no video was written\n")
    assert "decode\n" not in said
    assert InterruptedAtStep.steps == 1
    assert visible(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is before


def test_what_an_interrupt_breaks_on_its_way_is_no_error(transferring, monkeypatch, capsys):
    class Breaking(progress.StageProgress):
        def __call__(self, event):
            if event.stage == "encode video":
                signal.raise_signal(signal.SIGINT)
                raise ValueError("0 frames decode, 5 when it was opened")

    monkeypatch.setattr(progress, "StageProgress", Breaking)
    assert main(transferring) == 130
    assert capsys.readouterr().err.endswith("fastvmt: interrupted; no video was written\n")


def test_an_ignored_interrupt_stays_ignored(transferring, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "StageProgress", InterruptedAtStep)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main([*transferring, "-q"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "out.mp4").is_file()


def test_a_run_in_another_thread_sets_no_handler(transferring, tmp_path):
    thread = threading.Thread(target=main, args=([*transferring, "-q"],))
    thread.start()
    thread.join()
    assert (tmp_path / "out.mp4").is_file()


def test_an_interrupt_before_the_run_is_exit_code_130(transferring, monkeypatch, capsys):
    def interrupted(*_given):
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "load_pipeline", interrupted)
    assert main(transferring) == 130
    assert capsys.readouterr().err.endswith("fastvmt: interrupted\n")


def test_a_stopped_run_goes_on_with_resume_and_clears_up_after_itself(
    transferring, tmp_path, monkeypatch, capsys
):
    whole = [word.replace("out.mp4", "whole.mp4") for word in transferring]
    assert main([*whole, "-q"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(progress, "StageProgress", InterruptedAtStep)
        assert main([*transferring, "--resume", "-q"]) == 130
    assert "finished steps are in" in capsys.readouterr().err
    assert ".out.mp4.run" in visible(tmp_path)
    assert main([*transferring, "--resume", "-q"]) == 0
    assert ".out.mp4.run" not in visible(tmp_path)
    hashes = {read_record(tmp_path / name).video["frames_sha256"] for name in ("out.mp4", "whole.mp4")}
    assert len(hashes) == 1


# --- models -------------------------------------------------------------------------------------------------


def test_without_a_model_the_largest_complete_one_is_taken_else_nano_and_that_is_said(
    tmp_path, monkeypatch, capsys
):
    assert models.choose_model(None, tmp_path, Console().note).name == "Wan2.1-T2V-nano"
    assert "fetch one with: fastvmt download 1.3b" in capsys.readouterr().err
    assert models.choose_model(None, tmp_path, Console().note, picture=True).name == "Wan2.2-TI2V-nano"
    told = capsys.readouterr().err
    assert "photographs and real clips need a published model" in told
    assert "fetch one with: fastvmt download wan2.2-ti2v-5b" in told
    for checkpoint in PUBLISHED.values():
        (tmp_path / checkpoint.folder).mkdir()
    missing = {checkpoint.folder: ["config.json: missing"] for checkpoint in PUBLISHED.values()}
    missing |= {"Wan2.1-T2V-1.3B": [], "Wan2.1-I2V-14B-480P": []}  # one that needs a picture is passed over
    monkeypatch.setattr(models, "missing_files", lambda folder, _: missing[folder.name])
    assert models.choose_model(None, tmp_path, Console().note).name == "Wan2.1-T2V-1.3B"
    assert "model: 1.3b, the largest complete one below" in capsys.readouterr().err
    quiet = Console(quiet=True).note
    assert models.choose_model(None, tmp_path, quiet, picture=True).name == "Wan2.1-I2V-14B-480P"
    missing["Wan2.1-T2V-14B"] = []
    assert models.choose_model(None, tmp_path, quiet).name == "Wan2.1-T2V-14B"


def test_published_models_run_at_their_size_length_and_negative_prompt_by_command_and_call(tmp_path, caplog):
    folder = tmp_path / "Wan2.1-T2V-1.3B"  # the name alone tells that it is published
    folder.mkdir()
    wide = write_clip(tmp_path / "wide.mp4", num_frames=85, height=36, width=64)
    tall = write_clip(tmp_path / "tall.mp4", num_frames=3, height=64, width=36)
    made = task.make_task({"prompt": "a cat"}, wide, folder)
    assert (made.call, made.file.fps) == ({"prompt": "a cat"}, 15.0)

    def resolved(reference, **given):
        return resolve(given, run_defaults(folder), reference_facts(VideoData(reference)))

    run = resolved(wide)
    assert (run.height, run.width, run.num_frames) == (480, 832, 81)
    assert "the reference has 85 frames: the first 81 are used, 5.4 of its 5.67 seconds" in caplog.text
    run = resolved(tall)
    assert (run.height, run.width, run.num_frames) == (832, 480, 3)
    assert resolved(tall, height=320).height == 320
    prompts = resolve_prompts("a cat", None, run_defaults(folder))
    assert prompts == [("a cat", PUBLISHED_DEFAULTS["negative_prompt"])]
    assert resolve_prompts("a cat", "", run_defaults(folder)) == [("a cat", "")]


# --- the other commands -------------------------------------------------------------------------------------


def test_compare_puts_videos_beside_each_other(clip, tmp_path, capsys):
    out = tmp_path / "compare.mp4"
    assert main(["compare", clip, clip, "-o", out, "--height", "32", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"output": str(out), "labels": ["ref", "ref (2)"], "frames": 5, "fps": 15.0}
    assert VideoData(out).shape()[1] >= 64
    assert main(["compare", clip, clip, "-o", out]) == 2
    assert main(["compare", clip, "-o", tmp_path / "b.mp4"]) == 2
    assert "give two or more videos to compare" in capsys.readouterr().err
    for labels in (["a"], ["a", "a"]):
        assert main(["compare", clip, clip, "-o", tmp_path / "b.mp4", "--labels", *labels]) == 2
        assert "--labels must be 2 different texts" in capsys.readouterr().err
    assert compare.labels_of([clip, clip], ["left", "right"]) == ["left", "right"]


def test_inspect_shows_the_motion_without_generating(clip, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "motion"
    arguments = ["inspect", clip, "--model", tiny_checkpoint, "-o", out]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert all(Path(file).is_file() and Path(file).parent == out for file in result["files"])
    assert main(arguments) == 2
    assert f"output folder {out} has files in it; give another one, or --overwrite" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*arguments[:-1], tmp_path / "file"]) == 2
    assert "is a file; give the name of a folder" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--sigma", "2"]) == 2
    assert "sigma must be in (0, 1]" in capsys.readouterr().err


def test_inspect_draws_the_losses_of_a_record(clip, tiny_checkpoint, tmp_path, capsys):
    run = [
        "transfer",
        clip,
        "--model",
        tiny_checkpoint,
        "--prompt",
        "a cat",
        "--height",
        "32",
        "--width",
        "32",
    ]
    out = tmp_path / "out.mp4"
    assert main([*run, "--num-inference-steps", "2", "-o", out, "-q"]) == 0
    assert main(["inspect", f"{out}.json", "-o", tmp_path / "losses"]) == 0
    assert (tmp_path / "losses" / "losses.png").is_file()
    assert "the motion loss in 2 guided steps" in capsys.readouterr().out


def test_evaluate_measures_a_video_against_itself(tmp_path, capsys):
    pytest.importorskip("cv2")
    clip = write_clip(tmp_path / "a.mp4", num_frames=4, height=64, width=64)
    assert main(["evaluate", clip, clip, "--grid", "6", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["frames_compared"] == 4
    assert values["motion_fidelity_at_same_place"] == pytest.approx(1)
    assert main(["evaluate", clip, clip, "--grid", "6"]) == 0
    assert re.search(r"^motion fidelity at same place +1\.0000$", capsys.readouterr().out, re.MULTILINE)


def test_doctor_finds_everything_here_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    assert main(["doctor", "--models-dir", tmp_path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert facts["attention_kernels"]["sdpa"] == "usable"
    assert facts["models"]["nano"].startswith("complete in ")
    assert facts["models"]["14b"] == "not there; fetch it with: fastvmt download 14b"
    (tmp_path / "Wan2.1-T2V-1.3B").mkdir()
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no-such-package"))
    assert main(["doctor", "--models-dir", tmp_path]) == 1
    said = capsys.readouterr().out
    assert "package no-such-package is missing: pip install no-such-package" in said
    assert re.search(r"1\.3b +incomplete in .*config\.json: missing", said)


def test_plan_predicts_a_published_run_without_its_weights(tmp_path, capsys):
    arguments = ["plan", "--model", "1.3b", "--frames", "17", "--steps", "20", "--models-dir", tmp_path]
    assert main([*arguments, "--vram", "24", "--json", "--motion-guided-steps", "4"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["height"], plan["num_frames"], plan["num_inference_steps"]) == (480, 17, 20)
    assert 0 < plan["peak"] < 24 * 2**30
    assert plan["cost"]["sampling_ffe"] == 40
    assert main([*arguments, "--mode", "No_transfer"]) == 0
    assert "0 of guidance" in capsys.readouterr().out
    assert main([*arguments, "--vram", "0.8"]) == 1
    told = capsys.readouterr().err
    assert "needs at least" in told
    assert "--vram is 0.8" in told
    assert main(["plan", "--model", "1.3b", "--vram", "3"]) == 1
    assert "--motion-coarse 2 (" in capsys.readouterr().err


def test_plan_ends_with_the_command_that_runs_it(capsys):
    given = ["--model", "14b", "--vram", "12", "--width", "640", "--no-tiled", "--motion-block", "12"]
    given += ["--align=-3,0,1.5", "--tile-size", "20,30", "--tile-stride", "10,15"]
    assert main(["plan", *given]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    told = shlex.split(last.removeprefix("to run it: fastvmt "))
    again = vars(build_parser().parse_args([*told, "--overwrite"]))
    asked = task_options(vars(build_parser().parse_args(["plan", *given])))
    assert task_options(again) == {"prompt": "...", **asked}
    assert (again["model"], again["vram_budget_gb"]) == ("14b", 12)


def test_plan_takes_a_loaded_model_s_own_numbers(tiny_checkpoint, capsys):
    arguments = ["plan", "--model", tiny_checkpoint, "--height", "32", "--width", "32", "--frames", "5"]
    assert main([*arguments, "--preset", "fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_inference_steps"] == 25


def test_download_tells_what_it_fetches_and_a_failure_is_exit_code_1(tmp_path, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(download_command, "download", lambda *given: fetched.append(given) or tmp_path)
    assert main(["download", "all", "--models-dir", tmp_path, "--source", "huggingface"]) == 0
    assert [given[0].name for given in fetched] == [checkpoint.name for checkpoint in PUBLISHED.values()]
    assert "config.json: missing" in capsys.readouterr().err

    def fail(*_given):
        raise DownloadError("Could not fetch it")

    monkeypatch.setattr(download_command, "download", fail)
    assert main(["download", "14b", "--models-dir", tmp_path]) == 1
    assert "fastvmt: Could not fetch it" in capsys.readouterr().err


def test_decode_makes_the_video_of_latents_that_a_stopped_run_left(
    transferring, tiny_checkpoint, tmp_path, capsys
):
    state = tmp_path / "state"

    def keep(_task):
        """The latents stay, as they do when a run ends while it decodes."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "forget_run", keep)
        assert main([*transferring, "-q", "--checkpoint-dir", state]) == 0
    latents = next(state.glob("latents-*.safetensors"))
    arguments = ["decode", latents, "-o", tmp_path / "decoded.mp4", "--quality", "8"]
    assert main([*arguments, "--model", tiny_checkpoint, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["frames"] == 5
    decoded, made = (list(VideoData(tmp_path / name)) for name in ("decoded.mp4", "out.mp4"))
    assert [frame.tobytes() for frame in decoded] == [frame.tobytes() for frame in made]
    (tmp_path / "empty").mkdir()
    arguments[3] = tmp_path / "other.mp4"
    assert main([*arguments, "--model", tmp_path / "empty"]) == 1
    assert "the model cannot be loaded: folder" in capsys.readouterr().err
    shutil.copy(tiny_checkpoint / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "empty")
    assert main([*arguments, "--model", tmp_path / "empty"]) == 1
    assert f"{tmp_path / 'empty'} holds no VAE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fastvmt", "tra"], ["transfer"]),
        (["fastvmt", "transfer", "--samp"], ["--sampler"]),
        (["fastvmt", "transfer", "--sampler", ""], ["euler", "unipc", "renoise"]),
        (["fastvmt", "download", ""], [*PUBLISHED, "all"]),
    ],
)
def test_bash_completes_commands_options_and_choices(words, expected, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    quoted = " ".join(f"'{word}'" for word in words)
    place = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}"
    code = f"source '{script}'; {place}; _shtab_fastvmt; echo ${{COMPREPLY[@]}}"
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    offered = result.stdout.split()
    assert [word for word in offered if not word.startswith("-") or expected[0][0] == "-"] == expected


def test_other_shells_have_their_scripts(capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef fastvmt")
    assert main(["completion", "fish", "--json"]) == 0
    script = json.loads(capsys.readouterr().out)["script"]
    assert re.search(r"_using transfer' -l sampler -xka \"euler unipc renoise\"", script)
    for command in COMMANDS:
        assert re.search(rf"_using {command}'", script)


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "completion needs shtab: pip install 'fastvmt[completion]'" in capsys.readouterr().err


def test_a_folder_is_checked_by_writing_to_it(tmp_path):
    check_folder(tmp_path)
    assert visible(tmp_path) == []
