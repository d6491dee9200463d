"""`fastvmt transfer`: make one video, from options or from the record of an earlier run."""

import os
import shlex
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffsynth.cli.arguments import check_shard, flag, pictures_of
from diffsynth.cli.console import DONE, Console
from diffsynth.cli.progress import run_watched, saving_arguments
from diffsynth.configs.fields import fields_of
from diffsynth.configs.options import FileOptions, ReferenceOptions
from diffsynth.data import save_video
from diffsynth.evaluation.followed import beside_reference, follow_text
from diffsynth.jobs.errors import UsageError
from diffsynth.jobs.models import attention_kernel, choose_model, load_options, load_pipeline
from diffsynth.jobs.publish import check_folder, check_free, check_place, check_space
from diffsynth.jobs.task import (
    MadeVideo,
    VideoTask,
    forget_run,
    make_task,
    request_hash,
    summary,
    task_options,
    use_reference,
    was_made,
)
from diffsynth.runs.record import (
    RunRecord,
    describe_model,
    describe_pictures,
    differences,
    fingerprints,
    read_record,
    record_path,
)


def run(options: Namespace, console: Console) -> int:
    """Make the video. Errors that can be known beforehand are raised before the model loads.

    Raises:
        UsageError: an option is wrong or missing, or a recorded run cannot be repeated.
        RunFailedError: the model cannot be loaded.
    """
    is_rank = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun sets it
    several = is_rank or options.gpus is not None
    setup = {} if options.record is None else read_record(options.record).model["setup"]
    check_shard(setup | vars(options), several)
    if not several:
        return _make(options, console)
    if options.output is None:
        raise UsageError("a run on several processes needs -o OUT")
    from diffsynth.distributed.ranks import as_rank, launch

    if not is_rank:
        return launch(options.arguments, options.gpus)
    with as_rank(options.rank_timeout) as (rank, device):
        return _make(options, replace(console, quiet=rank > 0 or console.quiet), rank, str(device))


def _make(options: Namespace, console: Console, rank: int = 0, device: str | None = None) -> int:
    """Make the video, alone or, on the device that is named, as one of several ranks."""
    if options.output is None:
        check_folder(Path.cwd())
    else:
        check_place(options.output)
    recorded, told = None, list[str]()
    pictures = pictures_of(options)
    if options.record is None:
        loaded = load_options(vars(options))
        folder = choose_model(options.model, options.models_dir, told.append, loaded, picture=bool(pictures))
        asked = task_options(vars(options))
        task = make_task(asked, options.reference, folder, pictures)
    else:
        if asked := task_options(vars(options)):
            raise UsageError(f"--from repeats a run as it was; it takes no {', '.join(map(flag, asked))}")
        recorded = read_record(options.record)
        folder = choose_model(options.model or recorded.model["folder"], options.models_dir, told.append)
        loaded = load_options(vars(options), recorded.model["setup"])
        task = _repetition(recorded, options, pictures)
        asked = {"repeats": recorded.video["frames_sha256"], "created": recorded.created}
    model = describe_model(folder, asdict(loaded))
    job = request_hash(asked, task, model)
    if device is not None and options.checkpoint_dir is None and getattr(options, "resume", None) is None:
        options.resume = True
    saving = saving_arguments(options, options.output)
    task = replace(task, output=options.output, overwrite=options.overwrite, saving=saving, job=job)
    if options.output is not None:
        # What --overwrite asks for is another video, whose seed is drawn anew.
        if not options.overwrite and was_made(task, model):
            if rank == 0:
                forget_run(task)
            console.say(f"{options.output} was made before by the same request")
            console.result(_facts(options.output, read_record(record_path(options.output))))
            return DONE
        check_free(options.output, options.overwrite, [task.reference["path"]] if task.reference else [])
    check_space(options.output or Path.cwd() / "out.mp4", task.num_bytes, task.file.lossless)
    if recorded is not None:
        _check_unchanged(recorded, task, model, options.force, console)
    console.note("\n".join([*told, "load the model"]))
    pipe = load_pipeline(folder, loaded if device is None else replace(loaded, device=device))
    if recorded is not None:
        weights = {**model, "weights": fingerprints(pipe.residency.models)}
        _check_unchanged(recorded, task, weights, options.force, console)
    if device is None:
        made = run_watched(pipe, task, model, loaded, console)
    else:
        from diffsynth.distributed.ranks import spread_run

        several = spread_run(pipe, task.call, task.saving, options.shard)
        with several as (call, saving), attention_kernel(loaded):
            task = replace(task, call=call, saving=saving)
            if rank:
                pipe.run(**task.arguments, progress_bar_cmd=iter)
                return DONE
            made = run_watched(pipe, task, model, loaded, console)
    path, record, *_ = made
    console.say(summary(path, record))
    gif = _beside(made, task, options.gif, console)
    console.result({**_facts(path, record), **_compared(recorded, record, console), **gif})
    return DONE


def _beside(made: MadeVideo, task: VideoTask, gif: bool, console: Console) -> dict[str, str]:
    """Say what to look at, and how well the motion was followed where that can be told at once."""
    path, _, frames, reference = made
    if task.reference is None or reference is None or not path.is_file():
        return {}
    told = follow_text(frames, reference)
    beside = path.with_name(f"{path.stem}-beside.{'gif' if gif else 'mp4'}")
    words = ["fastvmt", "compare", task.reference["path"], str(path), "--paths", "-o", str(beside)]
    shown = shlex.join(words)
    if gif:  # which players repeat
        both = beside_reference({"reference": reference, "result": frames})
        shown = str(save_video(both, beside, fps=task.file.fps))
    console.say(f"to compare: {shown}{'; ' if told else ''}{told or ''}")
    return {"beside": shown} if gif else {}


def _facts(path: Path, record: RunRecord) -> dict[str, Any]:
    return {"output": str(path), "record_file": str(record_path(path)), "record": record.to_json()}


def _repetition(record: RunRecord, options: Namespace, pictures: Mapping[str, Path]) -> VideoTask:
    """Return the task that a record repeats; the reference and pictures may have other paths now."""
    pictures = {**{name: Path(picture["path"]) for name, picture in record.pictures.items()}, **pictures}
    path = options.reference
    if path is None and record.reference is not None:
        path = Path(record.reference["path"])
        if not path.exists():
            raise UsageError(
                f"the recorded reference {path} is not there; name its new place: "
                f"fastvmt transfer REF --from {options.record}"
            )
    video, reference = use_reference(path, fields_of(ReferenceOptions, record.reference or {}))
    call = record.call_arguments()
    return VideoTask(
        call=call,
        video=video,
        reference=reference,
        file=fields_of(FileOptions, record.video),
        size=(call["num_frames"], call["height"], call["width"]),
        pictures=describe_pictures(pictures),
    )


def _check_unchanged(
    record: RunRecord, task: VideoTask, model: Mapping[str, Any], force: bool, console: Console
) -> None:
    """Raise UsageError if reference, model or weights have changed since the record, unless force."""
    found = differences(record, task.reference, model, task.pictures)
    if found and not force:
        raise UsageError(f"the run cannot be repeated: {'; '.join(found)} (--force to run it all the same)")
    for text in found:
        console.problem(f"{text}; continuing because of --force")


def _compared(recorded: RunRecord | None, record: RunRecord, console: Console) -> dict[str, bool]:
    """Say whether a repetition gave the recorded frames, and if not, which versions differ."""
    if recorded is None:
        return {}
    same = recorded.video["frames_sha256"] == record.video["frames_sha256"]
    if same:
        console.say("every frame is bit-identical to the recorded one")
        return {"same_frames": True}
    then, now = ({**r.versions, **{f"device {k}": r.device[k] for k in r.device}} for r in (recorded, record))
    changed = [f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]]
    console.problem(f"the frames are not as recorded{': ' if changed else ''}{', '.join(changed)}")
    return {"same_frames": False}
