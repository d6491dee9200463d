"""`fastvmt inspect`: show the motion that a reference would transfer, or the losses of a finished run."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from diffsynth.cli.console import DONE, Console
from diffsynth.configs.defaults import run_defaults
from diffsynth.configs.fields import fields_of
from diffsynth.configs.options import DEFAULT_FPS, ReferenceOptions
from diffsynth.configs.resolve import motion_for, resolve
from diffsynth.data.tensors import video_to_tensor
from diffsynth.evaluation.figures import loss_curves
from diffsynth.evaluation.flow_images import displacements, flow_sheet, save_flow_video
from diffsynth.evaluation.followed import one_object, path_words
from diffsynth.evaluation.reference_flow import reference_flow
from diffsynth.jobs.errors import UsageError
from diffsynth.jobs.models import attention_kernel, choose_model, load_options, load_pipeline
from diffsynth.jobs.publish import check_folder
from diffsynth.jobs.task import open_reference
from diffsynth.pipelines.components import reference_facts
from diffsynth.planning.reference import warn_of_reference
from diffsynth.runs.record import read_record


def run(options: Namespace, console: Console) -> int:
    """Write the flow as a video and a sheet: arrows over the frames, colours beside them.

    Raises:
        UsageError: the output is a file, or a folder with files in it.
        ImportError: matplotlib is not installed, which draws losses.
    """
    if options.reference.suffix == ".json":
        return _draw_losses(options, console)
    output = options.output or Path(f"{options.reference.resolve().stem}-motion")
    _check_empty(output, options.overwrite)
    told: list[str] = []
    folder = choose_model(options.model, options.models_dir, told.append)
    motion = motion_for(folder, options.mode)
    # At the size and length at which a run would use it.
    size = {name: value for name, value in vars(options).items() if name in ("height", "width")}
    used = fields_of(ReferenceOptions, vars(options))
    shown = reference_facts(open_reference(options.reference, used))
    num_frames, height, width = resolve(size, run_defaults(folder), shown).size
    video = open_reference(options.reference, used, height=height, width=width)
    video.set_length(num_frames)
    loaded = load_options(vars(options))
    console.note("\n".join([*told, "load the model"]))
    pipe = load_pipeline(folder, loaded)
    console.note("read the motion")
    with attention_kernel(loaded):
        flow = reference_flow(pipe, video, motion=motion, sigma=options.sigma)
    output.mkdir(parents=True, exist_ok=True)
    fps = video.fps or DEFAULT_FPS
    path = save_flow_video(flow, output / "motion.mp4", sf=motion.sf, frames=video, fps=fps)
    sheet = output / "motion.png"
    flow_sheet(video, flow, sf=motion.sf).save(sheet)
    pairs, rows, cols = flow.shape[:3]
    console.say(f"{path}, {sheet}: flow of {pairs} pairs of latent frames, {rows}x{cols} tokens")
    pixels = video_to_tensor(video, len(video), *video.shape())
    still, cuts = warn_of_reference(pixels)
    facts: dict[str, Any] = {"still": still, "cuts": cuts, **displacements(flow, motion.sf)}
    console.say(
        f"displacement {facts['mean_displacement']:.2f} pixels a frame in the mean, "
        f"{facts['largest_displacement']:.2f} at most; {facts['share_moving']:.0%} of the tokens move"
    )
    if track := one_object(video):
        console.say(f"the object {path_words(track.centroids, fps)}, of {width}x{height}")
    else:
        console.say("no path is drawn: the video does not show one object before a plain background")
    files = {"files": [str(path), str(sheet)], "pairs": pairs, "token_grid": [rows, cols]}
    console.result({**files, **facts})
    return DONE


def _draw_losses(options: Namespace, console: Console) -> int:
    """Write a record's losses as a figure."""
    record = read_record(options.reference)
    figure = loss_curves(record.cost["losses"])
    output = options.output or Path(f"{options.reference.with_suffix('').stem}-losses")
    _check_empty(output, options.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "losses.png"
    figure.savefig(path)
    console.say(f"{path}: the motion loss in {len(record.cost['losses'])} guided steps")
    console.result({"files": [str(path)]})
    return DONE


def _check_empty(folder: Path, overwrite: bool) -> None:
    """Raise UsageError if the folder cannot be made, or has files in it."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file; give the name of a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(f"output folder {folder} has files in it; give another one, or --overwrite")
    check_folder(folder)
