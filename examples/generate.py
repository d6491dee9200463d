"""One generation with the options of `fastvmt transfer`; shared by the scripts of the published models."""

from functools import partial
from typing import Any

from arguments import CLIP, generation_parser, parse_arguments

from diffsynth import save_video
from diffsynth.configs.checkpoints import checkpoint_folder
from diffsynth.configs.descriptors import NO_TRANSFER
from diffsynth.jobs.models import attention_kernel, load_options, load_pipeline
from diffsynth.jobs.publish import write_output
from diffsynth.jobs.task import make_task, task_options


def main(model_dir: str) -> None:
    """Make a video with the options of the command line and print its path."""
    parser = generation_parser(model_dir)
    args = parse_arguments(parser)
    options = task_options(vars(args))
    reference = args.input_video or (None if options.get("mode") == NO_TRANSFER else CLIP)
    try:
        folder = checkpoint_folder(args.model_dir)
        task = make_task(options, reference, folder)
        loaded = load_options(vars(args))
        pipe = load_pipeline(folder, loaded)
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    latency: dict[str, Any] = {
        "test_latency": args.test_latency,
        "latency_dir": args.latency_dir or args.output_dir,
    }
    with attention_kernel(loaded):
        frames = pipe(**task.call, **latency, input_video=task.video)
    stem = f"{reference.stem if reference else 'text'}-{pipe.costs[0].mode}-seed{pipe.costs[0].seed}"
    write = partial(save_video, frames, fps=task.file.fps, quality=task.file.quality)
    print(write_output(frames, args.output_dir / f"{stem}.mp4", write, overwrite=False))
