"""Write docs/api.md from the docstrings of the public names and the fields of the options.

python docs/make_api.py
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import diffsynth
from diffsynth import evaluation
from diffsynth.configs.caches import CACHES, Cache, CacheOptions
from diffsynth.configs.defaults import RunDefaults
from diffsynth.configs.descriptors import DESCRIPTORS, Descriptor
from diffsynth.configs.fields import OrNone, options_of
from diffsynth.configs.options import FileOptions, LoadOptions, RunOptions, SavingOptions, Shorthands
from diffsynth.configs.resolve import motion_for
from diffsynth.jobs.convert import convert_checkpoint
from diffsynth.models.attention import use_attention
from diffsynth.pipelines.denoise import RunEvent
from diffsynth.pipelines.generate import GeneratedVideo
from diffsynth.planning.plan import RunPlan
from diffsynth.runs.cost import RunCost
from diffsynth.runs.record import RunRecord, read_record

HERE = Path(__file__).parent
INTRO = """# API

Made from docstrings and from the fields of the options by `python docs/make_api.py`. Shapes are in brackets:
B batch, C channels, F frames, H rows, W columns. Pictures and videos are PIL images of mode RGB unless said
otherwise.

On the command line an option such as `num_frames` is `--num-frames`; those of `MotionGuidance` begin with
`--motion-`. A checkpoint's config.json and a preset may declare other defaults than the ones listed here.
"""
SECTIONS: dict[str, list[object]] = {
    "diffsynth": [getattr(diffsynth, name) for name in diffsynth.__all__ if name != "__version__"],
    "Options of a run": [RunOptions, Shorthands, CacheOptions, FileOptions, SavingOptions, LoadOptions],
    "Defaults": [RunDefaults, motion_for],
    "Results of a run": [GeneratedVideo, RunEvent, RunCost, RunPlan, RunRecord, read_record],
    "Registries": [Descriptor, Cache],
    "diffsynth.evaluation": [getattr(evaluation, name) for name in evaluation.__all__],
    "Elsewhere": [use_attention, convert_checkpoint],
}
REGISTRIES: Mapping[type, Mapping[str, Descriptor | Cache]] = {Descriptor: DESCRIPTORS, Cache: CACHES}
SPECIAL = ("__call__", "__getitem__")  # methods that are part of a class's interface, if they have docstrings


def page() -> str:
    """Return the whole page."""
    parts = [INTRO]
    for title, things in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [entry(thing) for thing in things]
    return "\n".join(parts)


def entry(thing: object) -> str:
    """Return signature and docstring of a function or a class; of a class also its options and methods."""
    if not inspect.isclass(thing):
        return _described("###", f"{_place(thing)}{_signature(thing)}", thing)
    options = option_table(thing)
    # The table has the arguments of a class of options.
    parts = [_described("###", _place(thing) if options else f"{_place(thing)}{_signature(thing)}", thing)]
    parts += [options] if options else []
    if thing in REGISTRIES:
        rows = [(f'`"{name}"`', facts.help) for name, facts in REGISTRIES[thing].items()]
        parts.append(_table(("name", "what it is"), rows))
    for name, member in vars(thing).items():
        if isinstance(member, property) and member.__doc__ and not name.startswith("_"):
            parts.append(f"- **`.{name}`** {_text(member)}\n")
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if inspect.isfunction(function) and function.__doc__ and (name[0] != "_" or name in SPECIAL):
            parts.append(_described("####", f".{name}{_signature(function)}", function))
    return "\n".join(parts)


def option_table(owner: type) -> str:
    """Return a table of the options that a dataclass states: name, values, default, help; empty for none."""
    if not hasattr(owner, "__dataclass_fields__"):
        return ""
    rows = []
    for name, (stated, default) in options_of(owner).items():
        short = f", `--{stated.short}`" if stated.short else ""
        none = f"; None: {stated.kind.none}" if isinstance(stated.kind, OrNone) and stated.kind.none else ""
        rows.append((f"`{name}`{short}", str(stated.kind), f"`{default!r}`", stated.help + none))
    return _table(("option", "value", "default", "what it is"), rows) if rows else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _place(thing: object) -> str:
    module = thing.__module__
    for public in (diffsynth, evaluation):
        if thing.__name__ in public.__all__:
            module = public.__name__
    return f"{module}.{thing.__name__}"


def _signature(function: Callable) -> str:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return ""
    kept = [p for name, p in signature.parameters.items() if name not in ("self", "cls")]
    # Types are told by the docstrings where they matter; with them signatures would fill the page.
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in kept]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    # Defaults that are functions by their names: "<function spam.eggs at 0x7f>" -> "eggs".
    text = re.sub(r"<function [\w.]*<lambda> at 0x\w+>", "...", text)
    text = re.sub(r"<(?:class|function|built-in function) '?(?:\w+\.)*(\w+)'?(?: at 0x\w+)?>", r"\1", text)
    return re.sub(r"mappingproxy\(({.*?})\)|<factory>", r"\1", text)


def _text(thing: object) -> str:
    # The page has tables of the options that `describe` adds.
    return inspect.cleandoc((thing.__doc__ or "").split("\n\n    Options:")[0])


def _described(level: str, heading: str, thing: object) -> str:
    text = _text(thing)
    generated = inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")
    return f"{level} `{heading}`\n\n{'' if generated else text}\n"


if __name__ == "__main__":
    (HERE / "api.md").write_text(page())
